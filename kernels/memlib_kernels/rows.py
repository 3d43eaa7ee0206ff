"""Tensors as rows that kernels walk over.

Axes: n rows (all leading axes), d features of a row; of attention b batch, h heads, n tokens.
"""

from __future__ import annotations

from torch import Tensor

from memlib_kernels.tiles import Tile


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """[… d] as [n d] with contiguous features, and the step from row to row. A copy if no view exists."""
    width = tensor.shape[-1] if tensor.ndim else 1
    rows = tensor.reshape(tensor.numel() // max(1, width), width)
    if rows.stride(-1) != 1 and width > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def dense(*tensors: Tensor) -> list[Tensor]:
    """Tensors with contiguous last axes."""
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def heads_last(like: Tensor, width: int) -> Tensor:
    """An empty [b h n width], laid out as [b n h width]: joining the heads then copies nothing."""
    b, h, n, _ = like.shape
    return like.new_empty(b, n, h, width).transpose(1, 2)


def tile_grid(rows: Tensor, used: Tile) -> tuple[int, int]:
    """Programs for tiles of [n d]."""
    n, d = rows.shape
    return -(-n // used.n), -(-d // used.m)
