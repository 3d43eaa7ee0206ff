"""The block and the one model."""

from __future__ import annotations

from memlib.models.block import MemoryTransformerBlock
from memlib.models.transformer import MemoryState, MemoryTransformer, ModelOutput

__all__ = ["MemoryState", "MemoryTransformer", "MemoryTransformerBlock", "ModelOutput"]
