"""What is compiled ahead of time: a kernel, with its optional parts, from its candidate tiles.

Each case starts a kernel through its own launch code, with tensors on the meta device. cases.py has all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memlib_kernels.tiles import Tile, next_power

Start = Callable[[int, torch.dtype, str], None]
Candidates = Callable[[str, int], list[Tile]]

WIDTHS = (16, 32, 64, 128, 256)  # of a head; other widths take the next wider row's tile
DTYPES = ((torch.float16, torch.bfloat16), (torch.float32,))  # those of a group share their tiles


@dataclass(frozen=True)
class Case:
    """One kernel. start(width, dtype, option): launch it; tiles(target, width): candidates, the best first;
    options: optional parts, the one that needs most first, so that a bad candidate fails at once;
    multiplies: whether it contains matrix products."""

    kernel: str
    start: Start
    tiles: Candidates
    options: tuple[str, ...] = ("plain",)
    multiplies: bool = True
    widths: tuple[int, ...] = WIDTHS
    dtypes: tuple[tuple[torch.dtype, ...], ...] = DTYPES

    @property
    def operation(self) -> str:
        """The operation that the kernel belongs to: "attention" of "attention_backward_keys"."""
        return re.split("_(?:forward|backward|later)", self.kernel)[0]


def square_tiles(owns: str) -> Candidates:
    """Tiles of two sides for a kernel whose program owns the side "n" or "m" and walks over the other.

    The larger tile first: it reads less memory for each product. A tile of one stage counts half, since it
    waits for each load. Of equal ones, that with the longer own side; then fewer warps, since each loads its
    operands; then more stages, which load further ahead.
    """

    def tiles(target: str, width: int) -> list[Tile]:
        stages = (3, 2, 1) if target.startswith("sm_") else (2, 1)
        sides = (128, 64, 32, 16)
        found = [Tile(n, m, w, s) for n in sides for m in sides for w in (4, 8) for s in stages]
        return sorted(found, key=lambda t: (-size(t), -getattr(t, owns), t.warps, -t.stages))

    return tiles


def size(tile: Tile) -> int:
    """Numbers of a tile, twice if it loads ahead."""
    return tile.n * tile.m * min(tile.stages, 2)


def slot_tiles(target: str, width: int) -> list[Tile]:
    """Tiles of one side, for a kernel that walks over rows and multiplies no matrices."""
    return [Tile(n, n, warps, 1) for n in (128, 64, 32, 16) for warps in (4, 8)]


def small_tiles(target: str, width: int) -> list[Tile]:
    """Tiles for a kernel that reads each number once: nothing is gained by more than 4096 numbers."""
    return [Tile(n, n, warps, 2) for n in (64, 32, 16) for warps in (4, 8)]


def whole_rows(target: str, width: int) -> list[Tile]:
    """Tiles of n whole rows, at most 4096 numbers; longer rows one by one, by more warps."""
    rows = [n for n in (64, 32, 16, 8, 4, 2, 1) if n == 1 or n * width <= 4096]
    least = min(16, width // 512)
    return [Tile(n, next_power(width), w, s) for n in rows for w in (4, 8, 16) if w >= least for s in (2, 1)]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
