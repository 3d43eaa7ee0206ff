"""Tile sizes, warps and pipeline stages of each kernel: a table, `tiles.json`, for every target.

The launchers read it, and the tests compile its rows, so that what users start is what was compiled. A width
that the table lacks takes the next wider row; where there is none, no tile was clean and torch computes
(`has_tiles`). A target that it lacks takes the newest GPU of the same maker that is not newer, or the oldest.
In the interpreter tiles have 64 x 64 numbers, inside `interpreted(block=16)` 16 x 16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlib_kernels.launch import INTERPRETER, runner, target


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


INTERPRETED = Tile(64, 64)
ANY = 1  # the width that a kernel asks for if its tiles do not depend on it
NO_LIMIT = 2**31
PATH = Path(__file__).with_name("tiles.json")


@lru_cache
def stored() -> dict[str, Any]:
    """The content of tiles.json. triton, checksums: what the rows were made from (tile_search.py)."""
    content: dict[str, Any] = json.loads(PATH.read_text())
    return content


def table() -> list[dict[str, Any]]:
    """The rows of tiles.json: kernel, width, dtype, target; the tile's n, m, warps, stages; and what the
    compiler reports of the kernel with each optional part."""
    rows: list[dict[str, Any]] = stored()["tiles"]
    return rows


def tile(kernel: str, width: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel for rows of `width` elements on the current target.

    Raises LookupError where the table has none: ask `has_tiles` first.
    """
    found = runner()
    if found is not None and found.tile is not None:
        return found.tile
    if target() == INTERPRETER:
        return INTERPRETED
    return chosen(kernel, width, str(dtype).removeprefix("torch."), target())


def has_tiles(operation: str, dtype: torch.dtype, *widths: int, rows: tuple[int, ...] = ()) -> bool:
    """Whether all kernels of an operation ("attention", "norm", …) have a tile for rows of these widths.

    rows: lengths of other rows that they load, of any size. All must be multiples of 16: the compilers load
    other rows number by number, and may spill.
    """
    limit = widest(operation, dtype)
    aligned = all(length % 16 == 0 for length in (*widths, *rows))
    return limit == NO_LIMIT or (aligned and max((1, *widths)) <= limit)


def widest(operation: str, dtype: torch.dtype) -> int:
    """The widest rows that all kernels of an operation have tiles for on the current target, 0 for none."""
    found = runner()
    if found is not None and (found.tile is not None or found.target == INTERPRETER):
        return NO_LIMIT
    return widest_row(operation, str(dtype).removeprefix("torch."), target())


# torch.compile calls it once and keeps the result: torch.compiler.assume_constant_result, without its import
widest.__dict__["_dynamo_marked_constant"] = True


@lru_cache
def widest_row(operation: str, dtype: str, where: str) -> int:
    """`widest`, by names."""
    kernels = {row["kernel"] for row in table() if row["kernel"].startswith(f"{operation}_")}
    widths = [[row["width"] for row in rows_of(kernel, dtype, where)] for kernel in kernels]
    return min((NO_LIMIT if found == [ANY] else max(found, default=0) for found in widths), default=0)


@lru_cache
def chosen(kernel: str, width: int, dtype: str, where: str) -> Tile:
    """The tile of the table's narrowest row that holds `width`. Raises LookupError if there is none."""
    rows = [row for row in rows_of(kernel, dtype, where) if row["width"] >= width]
    if not rows:
        raise LookupError(
            f"{kernel} has no tile for {width} numbers of {dtype} on {where}: none was without spills; "
            "torch computes this"
        )
    return tile_of(min(rows, key=lambda row: row["width"]))


def rows_of(kernel: str, dtype: str, where: str) -> list[dict[str, Any]]:
    """The table's rows of a kernel and dtype for a target, or for the nearest one that the table has."""
    maker = "gfx" if where.startswith("gfx") else "sm_"
    known = {row["target"] for row in table() if row["target"].startswith(maker)}
    older = [gpu for gpu in known if number(gpu) <= number(where)]
    nearest = max(older, key=number) if older else min(known, key=number)
    return [
        row
        for row in table()
        if row["kernel"] == kernel and row["dtype"] == dtype and row["target"] == nearest
    ]


def tile_of(row: dict[str, Any]) -> Tile:
    """The tile of a row of the table."""
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
