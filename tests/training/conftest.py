"""A run that takes a fraction of a second, on generated examples or on a text of its own."""

import pytest

from memlib.config import Config, override

TINY = {
    "model.hidden_dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.intermediate_dim": 16,
    "model.vocab_size": 16,
    "model.segment_length": 6,
    "memory.kinds": ["internal"],
    "memory.internal.num_slots": 8,
    "memory.internal.num_heads": 2,
    "task.segments": 3,
    "task.recall.num_pairs": 1,
    "task.recall.num_keys": 4,
    "task.recall.num_values": 4,
    "task.recall.num_fillers": 4,
    "training.batch_size": 4,
    "training.gradient_accumulation_steps": 1,
    "training.max_steps": 6,
    "training.warmup_steps": 2,
    "training.base_model_lr": 0.01,
    "training.memory_lr": 0.01,
    "training.gate_lr": 0.02,
    "training.log_steps": 1,
    "training.eval_steps": 3,
    "training.eval_examples": 64,
    "training.save_steps": 3,
}


@pytest.fixture
def tiny():
    """A function from changes by dotted path to the tiny config with them."""
    return lambda changes=None: override(Config(), TINY | (changes or {}))


@pytest.fixture
def text(tmp_path):
    """Changes that make the tiny run read a text, whose rows go on from batch to batch."""
    file = tmp_path / "verses.txt"
    file.write_text("".join(f"{i} green bottles, hanging on the wall. " for i in range(600)))
    return {"task.name": "text", "task.text.dataset": str(file), "model.vocab_size": 256}
