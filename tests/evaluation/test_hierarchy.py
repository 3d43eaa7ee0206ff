"""Banks read alone, and examples that follow one another in one stream."""

from __future__ import annotations

import pytest
import torch

from memlib import Trainer, load_config, override
from memlib.evaluation import evaluate
from memlib.evaluation.hierarchy import read_alone, recall_in_stream


@pytest.fixture(scope="module")
def trainer():
    small = {"memory.hds.num_slots": 16, "task.segments": 3, "task.segments_min": None}
    made = Trainer(override(load_config("recall_hds"), small))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def test_read_alone_is_that_banks_part_and_is_put_back(trainer):
    memory = trainer.model.blocks[0].memories["hds"]
    hidden = torch.randn(2, 5, 64)
    banks = torch.randn(2, 4, 16, 64)
    before = memory.banks.read(hidden, banks)
    for bank in range(4):
        only = torch.zeros_like(banks)
        only[:, bank] = banks[:, bank]
        with read_alone(memory, bank):
            alone = memory.banks.read(hidden, banks)
            torch.testing.assert_close(alone, memory.banks.read(hidden, only))
        assert not torch.allclose(alone, before, atol=1e-3)
    assert torch.equal(memory.banks.read(hidden, banks), before)


def test_the_gate_is_put_back_after_an_error_too(trainer):
    memory = trainer.model.blocks[0].memories["hds"]
    before = memory.banks.read_gate.bias.clone()
    with pytest.raises(ZeroDivisionError), read_alone(memory, 1):
        raise ZeroDivisionError
    assert torch.equal(memory.banks.read_gate.bias, before)
    with pytest.raises(IndexError, match="bank 4: choose one of 0 to 3"), read_alone(memory, 4):
        pass


def test_a_stream_begins_as_an_evaluation_and_goes_on_with_its_state(trainer):
    model, task = trainer.model, trainer.task
    said = recall_in_stream(model, task, episodes=3, rows=32)
    assert said[0] == pytest.approx(evaluate(model, task, examples=32, batch_size=32).accuracy)
    batches = [task.batch(32, episode, 0, split="test") for episode in range(3)]
    with torch.no_grad():
        whole = model.eval()(torch.cat([batch.tokens for batch in batches], 1)).logits.argmax(-1)
    last = whole[:, -batches[2].tokens.shape[1] :]
    right = (last == batches[2].targets)[batches[2].scored].float().mean()
    assert said[2] == pytest.approx(float(right))
