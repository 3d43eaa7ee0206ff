"""A score is what a plain count over the test split says."""

import pytest
import torch
from torch.nn import functional as F

from memlib.config import Config, RecallConfig, TextConfig, override
from memlib.evaluation import evaluate
from memlib.models import MemoryTransformer
from memlib.tasks import Recall, Text

SMALL = {
    "model.hidden_dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.intermediate_dim": 16,
    "model.vocab_size": 256,
    "model.segment_length": 6,
    "memory.kinds": ["internal"],
    "memory.internal.num_slots": 8,
    "memory.internal.num_heads": 2,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    built = MemoryTransformer(override(Config(), SMALL))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return built


@pytest.fixture
def recall():
    return Recall(RecallConfig(num_pairs=2, num_keys=4, num_values=4, num_fillers=4), 6, 3)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "verses.txt"
    file.write_text("".join(f"{i} green bottles, hanging on the wall. " for i in range(200)))
    return Text(TextConfig(dataset=str(file)), 6, 2)


def count(logits, batch):
    """(hits, summed loss, positions), position by position."""
    hits, loss, positions = 0, 0.0, 0
    for row, place in batch.scored.nonzero().tolist():
        target = batch.targets[row, place]
        hits += int(logits[row, place].argmax() == target)
        loss -= float(F.log_softmax(logits[row, place], 0)[target])
        positions += 1
    return hits, loss, positions


def agrees(score, counts):
    hits, loss, positions = (sum(part) for part in zip(*counts, strict=True))
    assert score.positions == positions
    assert score.accuracy == hits / positions
    assert score.loss == pytest.approx(loss / positions, rel=1e-5)


@torch.no_grad()
def test_examples_are_scored_with_the_memory_of_their_own_segments(model, recall):
    batches = [recall.batch(8, step, seed=5, split="test") for step in range(3)]
    counts = [count(model.eval()(batch.tokens).logits, batch) for batch in batches]
    score = evaluate(model, recall, examples=20, batch_size=8, seed=5)
    agrees(score, counts)
    assert score.chance == recall.chance == 0.25
    assert score.to_dict().keys() == {"accuracy", "loss", "positions", "chance"}


@torch.no_grad()
def test_without_memory_every_segment_stands_alone(model, recall):
    batch = recall.batch(8, 0, split="test")
    logits = torch.cat([model.eval()(piece).logits for piece in batch.tokens.split(6, 1)], 1)
    score = evaluate(model, recall, examples=8, batch_size=8, memory=False)
    agrees(score, [count(logits, batch)])
    assert score.loss != evaluate(model, recall, examples=8, batch_size=8).loss


@torch.no_grad()
def test_rows_of_a_text_carry_their_memory_until_it_begins_anew(model, text):
    """Read on into the second epoch: there rows are reset."""
    epoch = text.batches_per_epoch(8, "test")
    counts, state = [], None
    for step in range(epoch + 1):
        batch = text.batch(8, step, split="test")
        out = model.eval()(batch.tokens, memory_state=None if step == epoch else state)
        state = out.memory_state
        counts.append(count(out.logits, batch))
    agrees(evaluate(model, text, examples=8 * (epoch + 1), batch_size=8), counts)


def test_the_models_mode_is_left_as_it_was_and_no_gradient_is_kept(model, recall):
    for training in (True, False):
        model.train(training)
        evaluate(model, recall, examples=8, batch_size=8)
        assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_asks_the_same_questions(model, recall):
    first, again, other = (evaluate(model, recall, 64, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.loss != other.loss
