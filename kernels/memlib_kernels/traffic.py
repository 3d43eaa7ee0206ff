"""What attention's kernels load, store and compute, counted tile by tile.

Axes: b batch, h query heads, g key heads, n queries, m keys, k key width, e value width.

The counts follow the loops of attention_kernel.py: ragged last tiles, tiles that a causal mask or a window
skips, and products of whole tiles, masked scores included. `interpreted(record=True)` counts the same while a
kernel runs; tests/kernels/test_roofline.py demands equal numbers. Not counted here: float32 that is wider
than 128, which loads its rows in chunks, keys that are listed by `places`, and a bias for each pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memlib_kernels.tiles import Tile, next_power


@dataclass(frozen=True)
class Work:
    """loaded, stored: bytes; flops: of matrix products; exponentials: how many."""

    loaded: int = 0
    stored: int = 0
    flops: int = 0
    exponentials: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    def __add__(self, other: Work) -> Work:
        return Work(
            self.loaded + other.loaded,
            self.stored + other.stored,
            self.flops + other.flops,
            self.exponentials + other.exponentials,
        )

    def __mul__(self, times: int) -> Work:
        return Work(self.loaded * times, self.stored * times, self.flops * times, self.exponentials * times)


@dataclass(frozen=True)
class Attention:
    """Sizes of one attention. itemsize: bytes of a number of q, k, v; per_key: bytes that each key has beside
    k and v, such as its bias or whether it is valid; window: 0 for none."""

    b: int
    h: int
    g: int
    n: int
    m: int
    k: int
    e: int
    itemsize: int = 2
    causal: bool = False
    window: int = 0
    per_key: int = 0

    @property
    def wide(self) -> int:
        """Bytes of a number that is float32 at least: lse and delta."""
        return max(4, self.itemsize)

    @property
    def past(self) -> int:
        """How many keys come before the first query."""
        return self.m - self.n

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, in one head."""
        return sum(max(0, high - low) for low, high in map(self.seen, range(self.n)))

    def seen(self, query: int) -> tuple[int, int]:
        """The keys that a query sees: from, to."""
        high = min(self.m, max(0, query + self.past + 1)) if self.causal else self.m
        low = max(0, query + self.past + 1 - self.window) if self.window else 0
        return low, high


def query_tiles(sizes: Attention, tile: Tile) -> Iterator[tuple[int, int, int]]:
    """For each program that owns queries: its queries, the keys that it loads, the tiles that they fill."""
    for start in range(0, sizes.n, tile.n):
        low, high = 0, sizes.m
        if sizes.causal:
            high = min(sizes.m, max(0, start + tile.n + sizes.past))
        if sizes.window:
            low = max(0, start + sizes.past - sizes.window + 1) // tile.m * tile.m
        keys = max(0, high - low)
        yield min(tile.n, sizes.n - start), keys, -(-keys // tile.m)


def key_tiles(sizes: Attention, tile: Tile) -> Iterator[tuple[int, int, int]]:
    """For each program that owns keys: its keys, the queries of a head that it loads, the tiles they fill."""
    for first in range(0, sizes.m, tile.m):
        low, high = 0, sizes.n
        if sizes.causal:
            low = max(0, first - sizes.past) // tile.n * tile.n
        if sizes.window:
            high = min(sizes.n, max(0, first + tile.m - 1 + sizes.window - sizes.past))
        steps = max(0, -(-(high - low) // tile.n))
        yield min(tile.m, sizes.m - first), max(0, min(steps * tile.n, sizes.n - low)), steps


def forward(sizes: Attention, tile: Tile) -> Work:
    """attention_forward: scores and their weighted values. A row's new maximum costs one more exponential."""
    k, e, size = sizes.k, sizes.e, sizes.itemsize
    work = Work()
    for rows, keys, steps in query_tiles(sizes, tile):
        work += Work(
            rows * k * size + keys * ((k + e) * size + sizes.per_key),
            rows * (e * size + sizes.wide),
            steps * 2 * tile.n * tile.m * (next_power(k) + next_power(e)),
            steps * tile.n * (tile.m + 1),
        )
    return work * (sizes.b * sizes.h)


def backward_queries(sizes: Attention, tile: Tile) -> Work:
    """attention_backward_queries: scores, dp and dq; rows of q, out, dout, lse, dlse, and of dq and delta."""
    k, e, size, wide = sizes.k, sizes.e, sizes.itemsize, sizes.wide
    work = Work()
    for rows, keys, steps in query_tiles(sizes, tile):
        work += Work(
            rows * ((k + 2 * e) * size + 2 * wide) + keys * ((k + e) * size + sizes.per_key),
            rows * (k * size + wide),
            steps * 2 * tile.n * tile.m * (2 * next_power(k) + next_power(e)),
            steps * tile.n * tile.m,
        )
    return work * (sizes.b * sizes.h)


def backward_keys(sizes: Attention, tile: Tile) -> Work:
    """attention_backward_keys: scores, dv, dp and dk, for all query heads of a key head."""
    k, e, size = sizes.k, sizes.e, sizes.itemsize
    heads = sizes.h // sizes.g
    work = Work()
    for keys, rows, steps in key_tiles(sizes, tile):
        step = Work(
            keys * sizes.per_key,
            0,
            2 * tile.n * tile.m * 2 * (next_power(k) + next_power(e)),
            tile.n * tile.m,
        )
        row = Work((k + e) * size + 2 * sizes.wide)
        own = Work(keys * (k + e) * size, keys * (k + e) * size)
        work += own + (step * steps + row * rows) * heads
    return work * (sizes.b * sizes.g)
