"""The paper model: equal to what interpreted kernels do, and to figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memlib_kernels import roofline, traffic
from memlib_kernels.attention_kernel import backward, forward
from memlib_kernels.interpreter import interpreted
from memlib_kernels.tiles import Tile
from memlib_kernels.traffic import Attention, Work

README = Path(__file__).parents[2] / "kernels" / "README.md"

SHAPES = {
    "one tile": Attention(1, 1, 1, 16, 16, 16, 16, itemsize=4),
    "ragged": Attention(2, 1, 1, 37, 45, 20, 34, itemsize=4),
    "causal, ragged": Attention(1, 2, 2, 37, 37, 16, 16, itemsize=4, causal=True),
    "causal, more keys": Attention(1, 2, 1, 21, 70, 16, 16, itemsize=4, causal=True),
    "causal, more queries": Attention(1, 1, 1, 70, 21, 16, 16, itemsize=4, causal=True),
    "window": Attention(1, 1, 1, 70, 70, 16, 16, itemsize=4, causal=True, window=9),
    "window over the past": Attention(1, 1, 1, 20, 75, 16, 16, itemsize=4, window=40),
    "grouped heads, half precision": Attention(1, 6, 2, 33, 33, 24, 16, itemsize=2, causal=True),
    "padding": Attention(2, 1, 1, 19, 37, 16, 16, itemsize=4, per_key=1),
}
TILES = {"square": Tile(16, 16), "wide": Tile(16, 32), "tall": Tile(32, 16)}


def recorded(sizes, tile):
    """What the three kernels of both passes do, in order."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[sizes.itemsize]
    torch.manual_seed(0)
    q = torch.randn(sizes.b, sizes.h, sizes.n, sizes.k).to(dtype)
    k, v = (torch.randn(sizes.b, sizes.g, sizes.m, width).to(dtype) for width in (sizes.k, sizes.e))
    valid = torch.ones(sizes.b, sizes.m, dtype=torch.bool) if sizes.per_key else None
    options = (None, valid, None, sizes.causal, sizes.window, 0.3)
    with interpreted(tile, record=True) as record:
        out, lse = forward(q, k, v, *options)
        backward(out, lse, q, k, v, out, lse, *options, False)
    found = {}
    for launch, (name, _) in enumerate(record.launches):
        did = record.of(launch)
        counts = did.bytes("load"), did.bytes("store"), did.flops(), did.exponentials[launch]
        found[name] = Work(*counts)
    return found


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_equals_the_record(shape, tile):
    sizes, tile = SHAPES[shape], TILES[tile]
    assert recorded(sizes, tile) == {
        "attention_forward": traffic.forward(sizes, tile),
        "attention_backward_queries": traffic.backward_queries(sizes, tile),
        "attention_backward_keys": traffic.backward_keys(sizes, tile),
    }


def test_a_model_that_ignores_what_the_mask_skips_is_noticed():
    sizes = SHAPES["causal, ragged"]
    found = recorded(sizes, TILES["square"])["attention_forward"]
    assert found != traffic.forward(replace(sizes, causal=False), TILES["square"])
    assert found.flops < traffic.forward(replace(sizes, causal=False), TILES["square"]).flops


@pytest.mark.parametrize("causal, window", [(False, 0), (False, 3), (True, 0), (True, 3)])
def test_pairs_are_those_of_the_mask(causal, window):
    for n, m in ((5, 5), (3, 7), (7, 3)):
        query, key = torch.arange(n)[:, None] + m - n, torch.arange(m)
        seen = (key <= query) | (not causal)
        if window:
            seen &= key > query - window
        assert Attention(1, 1, 1, n, m, 16, 16, causal=causal, window=window).pairs() == int(seen.sum())


def test_floors_equal_the_tiles_where_nothing_is_wasted():
    """One tile that holds everything loads each tensor once and computes no masked score."""
    sizes = Attention(2, 3, 3, 32, 64, 16, 16)
    one = Tile(32, 64)
    tiled = traffic.forward(sizes, one)
    assert roofline.attention_forward(sizes) == replace(tiled, exponentials=sizes.b * sizes.h * 32 * 64)
    assert roofline.attention_backward_queries(sizes) == traffic.backward_queries(sizes, one)
    assert roofline.attention_backward_keys(sizes) == traffic.backward_keys(sizes, one)


def test_smaller_tiles_load_more():
    sizes = roofline.MODELS[0].attention()
    loads = [traffic.forward(sizes, Tile(side, 64)).loaded for side in (128, 64, 32)]
    assert loads == sorted(loads)
    assert roofline.attention_forward(sizes).loaded < loads[0]


def test_floors_by_hand():
    h100 = roofline.GPUS[1]
    square = Attention(8, 16, 16, 2048, 2048, 64, 64, causal=True)
    work = roofline.attention_forward(square)
    pairs = 8 * 16 * 2048 * 2049 // 2
    assert (work.flops, work.exponentials) == (2 * pairs * 128, pairs)
    assert work.bytes == 8 * 16 * 2048 * (4 * 64 * 2 + 4)
    assert h100.times(work)["products"] == pytest.approx(69.5e-6, rel=0.01)
    assert h100.times(work)["exponentials"] == pytest.approx(68.9e-6, rel=0.01)


def test_small_numbers_pay_only_for_few_rows():
    """The time of a read by R rows, in 16 and 8 bits, on both sides of the break-even."""
    h100 = roofline.GPUS[1]
    limit = roofline.rows_bound_by_memory(h100, 64, 16)
    assert limit == pytest.approx(989e12 / 3.35e12, abs=1)

    def longest(rows, bits):
        sizes = Attention(1, 1, 1, rows, 2**16, 64, 64)
        work = roofline.attention_forward(sizes) if bits == 16 else roofline.quantized_read(sizes, bits)
        return max(h100.times(work).values())

    assert longest(limit // 4, 8) < 0.6 * longest(limit // 4, 16)
    assert longest(2 * limit, 8) == longest(2 * limit, 16)


def test_the_readme_prints_the_tables():
    text = README.read_text()
    assert roofline.floors() in text and roofline.break_even() in text, (
        "python -m memlib_kernels.roofline prints other tables than kernels/README.md contains"
    )
