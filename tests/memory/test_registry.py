"""What holds for every registered memory beyond the laws."""

from __future__ import annotations

import pytest
from safetensors.torch import load_model, save_model

from memlib.config import MemoryConfig
from memlib.memory import MEMORIES


@pytest.mark.parametrize("name", MEMORIES)
def test_parameters_can_be_saved(name, tmp_path):
    """Views and expanded tensors train but cannot be saved, or crash optimizers."""
    memory = MEMORIES[name](getattr(MemoryConfig(), name), 16)
    assert [p for p in memory.parameters() if not p.is_contiguous()] == []
    save_model(memory, str(tmp_path / "memory.safetensors"))
    load_model(memory, tmp_path / "memory.safetensors")


@pytest.mark.parametrize("name", MEMORIES)
def test_has_a_group_of_options(name):
    assert hasattr(MemoryConfig(), name)
