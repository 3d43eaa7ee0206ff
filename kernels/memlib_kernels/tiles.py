"""Tile sizes, warps and pipeline stages of each kernel: a table, `tiles.json`, for every target.

The launchers read it, and the tests compile every row of it, so that what users start is what was compiled.
A width that the table lacks takes the next wider row, or a small tile if there is none. A target that it
lacks takes the newest GPU of the same maker that is not newer, or the oldest. Inside `interpreted(block=16)`
every tile has that side.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlib_kernels.launch import runner, target


@dataclass(frozen=True)
class Tile:
    """n: rows of a tile; m: columns, or keys; warps, stages: Triton's num_warps and num_stages."""

    n: int
    m: int
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


FALLBACK = Tile(64, 64)
WIDE = Tile(16, 16, stages=1)  # for rows wider than the table's: slow, but it fits
PATH = Path(__file__).with_name("tiles.json")


@lru_cache
def table() -> list[dict[str, Any]]:
    """The rows of tiles.json: kernel, width, dtype, target; the tile's n, m, warps, stages; and what the
    compiler reports of the kernel with each optional part (tile_search.py)."""
    rows: list[dict[str, Any]] = json.loads(PATH.read_text())["tiles"] if PATH.exists() else []
    return rows


def tile(kernel: str, width: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel for rows of `width` elements on the current target."""
    found = runner()
    if found is not None and found.tile is not None:
        return found.tile
    return chosen(kernel, width, str(dtype).removeprefix("torch."), target())


@lru_cache
def chosen(kernel: str, width: int, dtype: str, where: str) -> Tile:
    """The table's row for a kernel, width, dtype and target, or the nearest one."""
    rows = [row for row in table() if row["kernel"] == kernel and row["dtype"] == dtype]
    maker = "gfx" if where.startswith("gfx") else "sm_"
    rows = [row for row in rows if row["target"].startswith(maker)]
    if not rows:
        return FALLBACK
    known = {number(row["target"]) for row in rows}
    nearest = max((gpu for gpu in known if gpu <= number(where)), default=min(known))
    rows = [row for row in rows if number(row["target"]) == nearest]
    wider = [row for row in rows if row["width"] >= width]
    if not wider:
        return WIDE
    row = min(wider, key=lambda row: row["width"])
    return Tile(row["n"], row["m"], row["warps"], row["stages"])


def number(where: str) -> int:
    """sm_90 -> 90; gfx942 -> 942."""
    return int("".join(c for c in where if c.isdigit()) or 0)


def next_power(width: int) -> int:
    """The smallest power of two from 16 on that holds `width`: the side of a tile that tl.dot accepts."""
    return max(16, 1 << (width - 1).bit_length())


def accumulator(tensor: Tensor) -> Any:
    """The dtype that sums are kept in: float32, or float64 for float64 inputs (in the interpreter only)."""
    import triton.language as tl

    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def precision(tensor: Tensor) -> str:
    """How float32 products are made. tf32x3 keeps float32's accuracy on NVIDIA's tensor cores; AMD's have
    float32 itself. Half precision does not ask."""
    return "tf32x3" if tensor.dtype == torch.float32 and target().startswith("sm_") else "ieee"
