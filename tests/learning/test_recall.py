"""The one claim all others serve: memory lets a model answer what its window cannot hold."""

import pytest
import torch

from memlib.config import load_config, override
from memlib.evaluation import evaluate
from memlib.evaluation.retrieval import measure_task
from memlib.training.trainer import Trainer

from .early import train_until_learned

CHANCE, TOLERANCE, EXAMPLES = 1 / 16, 0.03, 512


@torch.no_grad()
def accuracy_with_anothers_memory(model, task):
    """Accuracy on the last segment of each row, read with the memory of the row before it."""
    batch = task.batch(EXAMPLES, 0, split="test")
    cut = (task.segments - 1) * task.segment_length
    state = model.eval()(batch.tokens[:, :cut]).memory_state
    state = state.rows(torch.arange(EXAMPLES).roll(1))
    logits = model(batch.tokens[:, cut:], memory_state=state).logits
    right = logits.argmax(-1) == batch.targets[:, cut:]
    return float(right[batch.scored[:, cut:]].double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preset", ["recall_internal", "recall_external"])
def test_memory_recalls_across_segments_and_only_memory_does(preset, seed):
    config = override(
        load_config(preset),
        {
            "training.seed": seed,
            "training.max_steps": 40,
            "training.gate_lr": 0.002,
            "task.segments": 4,
            "task.segments_min": None,
        },
    )
    trainer = train_until_learned(Trainer(config))
    model, task = trainer.model, trainer.task
    assert task.chance == CHANCE
    assert evaluate(model, task, EXAMPLES).accuracy >= 0.95
    assert abs(evaluate(model, task, EXAMPLES, memory=False).accuracy - CHANCE) <= TOLERANCE
    assert abs(accuracy_with_anothers_memory(model, task) - CHANCE) <= TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_a_passkey_is_found_behind_128_windows_of_noise_by_every_exact_search():
    """Trained on at most five windows of distance; the state's search and a store's must agree."""
    with torch.enable_grad():
        trainer = train_until_learned(Trainer(load_config("passkey_external")))
    far = {"segments": 128, "passkey.depth": 0.0}
    assert abs(trainer.evaluate(256, memory=False).accuracy - 0.1) <= 0.06
    task = trainer.make_task(override(trainer.config.task, {**far, "segments_min": None}))
    by_index = {r.index: r.accuracy for r in measure_task(trainer.model, task, ["torch", "flat", "hnsw"], 32)}
    assert by_index["state"] >= 0.98
    assert by_index["torch"] == by_index["state"] and by_index["flat"] == by_index["state"]
    assert by_index["hnsw"] >= by_index["state"] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("join", ["heads", "joint"])
def test_every_way_to_join_the_attention_learns(join):
    trainer = Trainer(override(load_config("recall_external"), {"memory.external.join": join}))
    train_until_learned(trainer, 60)
    assert trainer.evaluate(segments=4).accuracy >= 0.95


@pytest.mark.slow
def test_keys_need_their_token_shift():
    """What the recipe rests on: filed under its own key, not the one before it, a value is not found."""
    changes = {"memory.external.shift_init": 0.0, "training.max_steps": 60}
    trainer = Trainer(override(load_config("recall_external"), changes))
    trainer.train(progress=False)
    assert trainer.evaluate(segments=4).accuracy <= 0.5
