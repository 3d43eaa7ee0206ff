"""The one claim all others serve: memory lets a model answer what its window cannot hold."""

import pytest
import torch

from memlib.config import load_config, override
from memlib.evaluation import evaluate
from memlib.training.trainer import Trainer

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
def test_memory_recalls_across_segments_and_only_memory_does(seed):
    config = override(
        load_config("recall_internal"),
        {
            "training.seed": seed,
            "training.max_steps": 40,
            "training.gate_lr": 0.002,
            "task.segments": 4,
            "task.segments_min": None,
        },
    )
    trainer = Trainer(config)
    trainer.train(progress=False)
    model, task = trainer.model, trainer.task
    assert task.chance == CHANCE
    assert evaluate(model, task, EXAMPLES).accuracy >= 0.95
    assert abs(evaluate(model, task, EXAMPLES, memory=False).accuracy - CHANCE) <= TOLERANCE
    assert abs(accuracy_with_anothers_memory(model, task) - CHANCE) <= TOLERANCE
