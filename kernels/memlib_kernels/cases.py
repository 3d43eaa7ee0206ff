"""Which kernels are compiled ahead of time, with which optional parts, from which candidate tiles.

Each case starts a kernel through its own launch code, with tensors on the meta device. A kernel without a
case has no row in tiles.json. To add one: write a function that launches it, and a Case in CASES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memlib_kernels.tiles import Tile

Start = Callable[[int, torch.dtype, str], None]

WIDTHS = (64, 128)  # other widths take the next wider row's tile
WITH_OPTIONS = 64  # the width at which the optional parts are compiled too
DTYPES = ((torch.float16, torch.bfloat16), (torch.float32,))  # those of a group share their tiles


@dataclass(frozen=True)
class Case:
    """One kernel. start(width, dtype, option): launch it; tiles(target): candidates, the largest first;
    options: "plain" or what replaces it, then the optional parts, which are compiled at one width;
    multiplies: whether it contains matrix products."""

    kernel: str
    start: Start
    tiles: Callable[[str], list[Tile]]
    options: tuple[str, ...]
    multiplies: bool = True
    widths: tuple[int, ...] = WIDTHS
    dtypes: tuple[tuple[torch.dtype, ...], ...] = DTYPES

    def parts(self, width: int) -> tuple[str, ...]:
        """The options that are compiled at a width."""
        return self.options if width == WITH_OPTIONS else self.options[:1]


def square_tiles(owns: str) -> Callable[[str], list[Tile]]:
    """Tiles of two sides for a kernel whose program owns the side "n" or "m" and walks over the other.

    The larger tile first: it reads less memory for each product. Of equal ones, that with the longer own
    side; then fewer warps, since each loads its operands; then more stages, which load further ahead.
    """

    def tiles(target: str) -> list[Tile]:
        stages = (3, 2, 1) if target.startswith("sm_") else (2, 1)
        sides = (128, 64, 32, 16)
        found = [Tile(n, m, w, s) for n in sides for m in sides for w in (4, 8) for s in stages]
        return sorted(found, key=lambda t: (-t.n * t.m, -getattr(t, owns), t.warps, -t.stages))

    return tiles


def row_tiles(target: str) -> list[Tile]:
    """Tiles of one side, for a kernel that walks over rows and multiplies no matrices."""
    return [Tile(n, n, warps, 1) for n in (128, 64, 32, 16) for warps in (4, 8)]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(width: int, dtype: torch.dtype, option: str) -> None:
    """Both passes of attention. Two query heads share a key head."""
    from memlib_kernels.attention_kernel import backward, forward

    b, h, g = 2, 4, 2
    n, m = (509, 1021) if option == "odd lengths" else (1024, 1024)
    q, k, v = (meta(b, heads, rows, width, dtype=dtype) for heads, rows in ((h, n), (g, m), (g, m)))
    bias = valid = places = None
    window, causal = 0, True
    if "bias per key" in option:
        bias = meta(b, h, 1, m, dtype=dtype)
    if option == "bias per pair":
        bias = meta(b, h, n, m, dtype=dtype)
    if option == "valid, window":
        valid, window = meta(b, m, dtype=torch.bool), 256
    if option.startswith("places"):
        places, causal = meta(b, h, n // 64, 256, dtype=torch.int32), False
    scale = width**-0.5
    out, lse = forward(q, k, v, bias, valid, places, causal, window, scale)
    backward(out, lse, q, k, v, out, lse, bias, valid, places, causal, window, scale, bias is not None)


DENSE = ("plain", "bias per pair", "valid, window", "bias per key", "odd lengths")

CASES = (
    Case("attention_forward", attention, square_tiles("n"), (*DENSE, "places")),
    Case("attention_backward_queries", attention, square_tiles("n"), (*DENSE, "places")),
    Case("attention_backward_keys", attention, square_tiles("m"), DENSE),
    Case("attention_backward_slots", attention, row_tiles, ("places", "places, bias per key"), False),
)
