"""A recorded launch as plain arrays, and its view."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from memlib.lab.launches import launch_of, span
from memlib.lab.widgets import drive, launch_view, save_page
from memlib.lab.widgets.launches import COLOURS, OTHERS, UNTOUCHED, colours_at, layout, rgb
from memlib_kernels import attention_kernel
from memlib_kernels.attention import flash_attention
from memlib_kernels.interpreter import Product, interpreted
from memlib_kernels.memory_attention import memory_attention

ROWS, WIDTH, TILE = 40, 16, 16
COLUMNS = {"Q": WIDTH, "K": WIDTH, "V": WIDTH, "Out": WIDTH, "Lse": 1}


@pytest.fixture(scope="module")
def record():
    """Causal attention of 40 tokens in tiles of 16, forward and backward: three launches."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, ROWS, WIDTH, requires_grad=True) for _ in range(3))
    with interpreted(block=TILE, record=True) as record:
        flash_attention(q, k, v, causal=True)[0].sum().backward()
    return record


@pytest.fixture(scope="module")
def seen(record):
    return launch_of(record, COLUMNS, pairs=("Q", "K"))


def tiles(rows=ROWS):
    return [(start, min(start + TILE, rows)) for start in range(0, rows, TILE)]


def test_every_access_is_the_tile_of_its_program(seen):
    """Program i: its queries; each tile of keys and values up to its own; its outputs."""
    names = seen.names
    expected = []
    for i, (low, high) in enumerate(tiles()):
        expected.append((i, "Q", low, high))
        for begin, end in tiles(high):
            expected += [(i, "K", begin, end), (i, "V", begin, end)]
        expected += [(i, "Out", low, high), (i, "Lse", low, high)]
    assert len(expected) == len(seen.grid)
    for t, (program, name, low, high) in enumerate(expected):
        assert (seen.program[t], names[seen.grid[t]]) == (program, name)
        wide = COLUMNS[name]
        assert seen.of_tensor(t).tolist() == list(range(low * wide, high * wide))
        assert seen.store[t] == (name in ("Out", "Lse"))
        assert seen.bytes[t] == 4 * (high - low) * wide


def test_pairs_are_the_causal_staircase(seen):
    first = seen.first[-2]
    met = np.zeros((ROWS, ROWS), dtype=int)
    met.ravel()[seen.elements[seen.elements >= first] - first] = 1
    expected = np.zeros_like(met)
    for low, high in tiles():
        expected[low:high, :high] = 1
    assert (met == expected).all()
    assert (np.bincount(seen.elements[seen.elements >= first] - first) <= 1).all(), "no pair twice"


def test_pairs_meet_whichever_is_loaded_first(record):
    """In the kernel for keys a program holds its keys, and walks over the queries."""
    keys = launch_of(record, {"Q": WIDTH, "K": WIDTH}, launch=2, pairs=("Q", "K"))
    queries = launch_of(record, {"Q": WIDTH, "K": WIDTH}, launch=1, pairs=("Q", "K"))
    assert keys.kernel == "attention_backward_keys" and keys.names[keys.grid[0]] == "K"
    one, other = (
        set(found.elements[found.elements >= found.first[-2]].tolist()) for found in (keys, queries)
    )
    assert one == other and len(one) == sum((high - low) * high for low, high in tiles())


def test_bytes_and_operations_are_the_record_s(record, seen):
    ours = [a for a in record.accesses if a.launch == 0]
    assert seen.bytes.sum() == sum(a.bytes for a in ours)
    assert seen.flops.sum() == sum(p.flops for p in record.products if p.launch == 0)
    once = seen.loaded_once()
    assert once[-1] == 3 * 4 * ROWS * WIDTH and (np.diff(once) >= 0).all()
    # The first product needs a tile of queries, one of keys and one of values.
    assert seen.flops[:2].tolist() == [0, 0] and seen.flops[2] == 2 * 2 * TILE**2 * WIDTH


def test_operations_of_another_launch_are_not_counted(record):
    """Between two accesses of Q in the third launch lie four products, whatever was launched before."""
    keys = launch_of(record, {"Q": WIDTH}, launch=2)
    assert set(keys.flops.tolist()) == {4 * 2 * TILE**2 * WIDTH}


def test_scattered_places_are_scattered_elements():
    torch.manual_seed(0)
    q, keys = torch.randn(1, 1, 4, WIDTH), torch.randn(1, 1, 30, WIDTH)
    places = torch.tensor([[[2, 27, 7, -1]]])
    with interpreted(block=16, record=True) as record:
        memory_attention(q, keys, keys.clone(), places=places)
    seen = launch_of(record, {"Q": WIDTH, "K": WIDTH}, pairs=("Q", "K"))
    loads = [t for t in range(len(seen.grid)) if seen.names[seen.grid[t]] == "K"]
    assert [sorted({int(e) // WIDTH for e in seen.of_tensor(t)}) for t in loads] == [[2, 7, 27]]
    assert "rows 2, 7, 27 of K" in seen.say(loads[0])
    assert seen.rows.tolist() == [4, 30, 4], "all slots are shown, also those behind the last listed one"
    pairs = seen.elements[seen.elements >= seen.first[-2]] - seen.first[-2]
    assert {(int(p) // 30, int(p) % 30) for p in pairs} == {(i, j) for i in range(4) for j in (2, 7, 27)}


def test_an_access_in_words(seen):
    assert seen.say(0) == "program 0 loads rows 0–15 of Q (1,024 bytes)"
    assert seen.say(len(seen.grid) - 1) == "program 2 stores rows 32–39 of Lse (32 bytes)"
    assert span(np.array([3])) == "3" and span(np.array([1, 5, 7, 8, 20])) == "1, 5, 7, 8, … 20"


def test_an_access_names_its_line(seen):
    source = Path(attention_kernel.__file__).read_text(encoding="utf-8").splitlines()
    for line, store in zip(seen.line, seen.store, strict=True):
        assert ("tl.store(" if store else "tl.load(") in source[line - 1]


def test_programs_of_two_axes_are_named_by_both():
    q = torch.randn(1, 2, 20, 16)
    with interpreted(block=16, record=True) as record:
        flash_attention(q, q, q)
    assert launch_of(record, {"Q": 16}).programs == ["(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)"]


def test_unknown_tensors_are_refused(record):
    with pytest.raises(ValueError, match=r"launch 0 of 3 does not touch Bank; it touches K, Lse, Out, Q, V"):
        launch_of(record, {"Bank": 4})
    with pytest.raises(ValueError, match=r"does not touch K"):
        launch_of(record, {"Q": 16}, pairs=("Q", "K"))
    with interpreted(block=16) as silent:
        flash_attention(*(torch.randn(1, 1, 4, 16) for _ in range(3)))
    with pytest.raises(ValueError, match=r"nothing: launch in `with interpreted\(record=True\)`"):
        launch_of(silent, {"Q": 16})


def test_colours_say_who_touched_what(seen):
    time = next(t for t in range(len(seen.grid)) if seen.program[t] == 1 and seen.names[seen.grid[t]] == "K")
    colours, first = colours_at(seen, time), seen.first
    assert (colours[first[0]] == rgb(OTHERS)).all(), "queries of program 0"
    assert (colours[first[0] + TILE * WIDTH] == rgb(COLOURS["load"][1])).all(), "queries of program 1"
    assert (colours[first[1]] == rgb(COLOURS["load"][0])).all(), "keys loaded now"
    assert (colours[first[2] - 1] == rgb(UNTOUCHED)).all(), "the last keys"
    assert (colours[first[-2] + TILE * ROWS] == rgb(COLOURS["pair"][0])).all(), "scores of program 1"
    assert (colours_at(seen, len(seen.grid) - 1)[first[5] - 1] == rgb(COLOURS["store"][0])).all()


def test_the_picture_fits(record):
    """Grids do not overlap and stay within the picture, few and many, flat and tall."""
    for columns in (COLUMNS, {"Q": 640}, {"Lse": 40, "Out": 640, "K": 16, "V": 1}):
        seen = launch_of(record, columns, pairs=("K", "V") if "V" in columns else None)
        boxes, height = layout(seen)
        assert height <= 4 and all(
            x >= 0 and x + wide <= 8 and y + high <= height for x, y, wide, high in boxes
        )
        for i, (x, y, wide, high) in enumerate(boxes):
            assert x >= 0 and x + wide <= 8 and y + high <= height
            for u, v, w, h in boxes[i + 1 :]:
                assert u >= x + wide or v >= y + high or u + w <= x or v + h <= y


def test_the_view_counts_and_packs(record, tmp_path):
    view = launch_view(record, COLUMNS, pairs=("Q", "K"))
    pairs = sum((high - low) * high for low, high in tiles())
    assert f"{pairs:,} of 1,600 pairs of rows of Q and K met" in view.summary
    assert "attention_forward: 3 programs, 21 loads and stores" in view.summary
    assert view.arrays["once"][-1] == 3 * 4 * ROWS * WIDTH < view.arrays["loaded"][-1]
    assert drive(view) >= 9
    save_page(tmp_path / "x.html", view)
    assert (tmp_path / "x.html").stat().st_size < 150_000


def test_more_operations_than_a_view_counts_are_refused(record):
    huge = replace(record, products=[Product(0, (0, 0, 0), 2**11, 2**11, 2**11)])
    with pytest.raises(ValueError, match=r"17,179,869,184 operations are more than a view counts"):
        launch_view(huge, COLUMNS)
