"""The blocks and the one model."""

from __future__ import annotations

from memlib.models.block import TransformerBlock
from memlib.models.memory_block import MemoryTransformerBlock, VanillaTransformerBlock
from memlib.models.state import MemoryState, ModelOutput
from memlib.models.transformer import MemoryTransformer

__all__ = [
    "MemoryState",
    "MemoryTransformer",
    "MemoryTransformerBlock",
    "ModelOutput",
    "TransformerBlock",
    "VanillaTransformerBlock",
]
