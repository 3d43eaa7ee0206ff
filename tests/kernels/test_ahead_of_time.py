"""Kernels compiled for GPUs that are not here: what the compilers report, and the table of tiles."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from triton import knobs
from triton.runtime.driver import driver

from memlib_kernels import attention_kernel, tile_search
from memlib_kernels.ahead_of_time import SHARED_LIMIT, Report, allowed_products, compile_only, own_cache
from memlib_kernels.attention import flash_attention
from memlib_kernels.cases import CASES, Case, attention
from memlib_kernels.interpreter import interpreted
from memlib_kernels.launch import runner
from memlib_kernels.tiles import Tile, chosen, table

HALF = torch.bfloat16
CASE = {case.kernel: case for case in CASES}


@pytest.fixture(scope="module", autouse=True)
def cache():
    with own_cache():
        yield


def compiled(target, tile, width=64, dtype=HALF, only="attention_forward"):
    """One kernel of a causal attention, compiled."""
    with compile_only(target, tile, only) as found:
        attention(width, dtype, "plain")
    (kernel,) = found
    return kernel


def test_interpreted_and_compiled_in_one_process_in_any_order():
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    with interpreted() as before:
        first, _ = flash_attention(q, k, v, causal=True)
    with compile_only("sm_80") as found:
        untouched, _ = flash_attention(q, k, v, causal=True)
    with interpreted() as after:
        again, _ = flash_attention(q, k, v, causal=True)
    assert before.launches == after.launches and len(before.launches) == 1
    assert torch.equal(first, again)
    assert [kernel.name for kernel in found] == ["attention_forward"]
    assert untouched.shape == first.shape and not torch.equal(untouched, first), "nothing may have run"
    inner = compile_only("gfx942")
    with interpreted() as record, inner as nested:
        flash_attention(q, k, v)
    assert [kernel.name for kernel in nested] == ["attention_forward"] and not record.launches


def test_nothing_stays_behind():
    before = driver._active
    with pytest.raises(ZeroDivisionError), compile_only("sm_80", Tile(32, 32)):
        attention(16, HALF, "plain")
        raise ZeroDivisionError
    assert driver._active is before and runner() is None
    assert "sm_80" not in attention_kernel.attention_forward.device_caches
    outside = knobs.cache.dir
    with own_cache():
        assert knobs.cache.dir != outside
    assert knobs.cache.dir == outside


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target 'sm_75': must be one of sm_80"), compile_only("sm_75"):
        pass


def test_arguments_are_specialised_as_on_a_gpu():
    with compile_only("sm_80", Tile(32, 32), only="attention_forward") as found:
        attention(16, HALF, "plain")
        attention(16, HALF, "odd lengths")
    aligned, odd = (kernel.binary.src for kernel in found)
    names = attention_kernel.attention_forward.arg_names
    n = names.index("n")
    assert ["tt.divisibility", 16] in aligned.attrs[(n,)] and not odd.attrs.get((n,))
    assert aligned.signature["Q"] == "*bf16" and aligned.signature["q_n"] == "i32"
    assert aligned.signature["valid_m"] == "i32"  # 0, and not 1, which would become a constant


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_tile_that_spills_is_noticed(target):
    """The report's spills are what the machine code does: stores to and loads from local memory."""
    small, large = compiled(target, Tile(64, 64)), compiled(target, Tile(128, 128, warps=4))
    own = allowed_products(target, HALF)
    assert small.report().spills == 0 and not small.report().problems(target, own)
    assert "STL" not in small.binary.asm["sass"] and "LDL" not in small.binary.asm["sass"]
    assert large.report().registers >= 255 and large.report().spills > 0
    assert "spills" in large.report().problems(target, own)[0]
    assert "STL" in large.binary.asm["sass"] and "LDL" in large.binary.asm["sass"]


def test_a_tile_that_spills_on_amd_is_noticed():
    report = compiled("gfx942", Tile(64, 128, warps=8), only="attention_backward_keys", width=128).report()
    assert report.spills > 0 and "spills" in report.problems("gfx942", ("mfma",))[0]


@pytest.mark.parametrize("side, product", [(64, "wgmma bf16"), (32, "mma.sync bf16")])
def test_a_small_tile_that_drops_to_an_older_instruction_is_noticed(side, product):
    report = compiled("sm_90", Tile(side, 64)).report()
    assert report.product == product
    assert bool(report.problems("sm_90", allowed_products("sm_90", HALF))) == (side == 32)


def test_limits_of_shared_and_tensor_memory():
    shared = compiled("sm_80", Tile(64, 128, warps=8, stages=3), width=256).report()
    assert shared.shared > SHARED_LIMIT["sm_80"]
    assert "shared memory" in " ".join(shared.problems("sm_80", ("mma.sync",)))
    columns = compiled("sm_100", Tile(64, 64, warps=8), width=256, dtype=torch.float32).report()
    assert columns.tensor_memory > 512 and columns.product == "none"  # Triton made a trap of it
    assert "tensor memory" in columns.problems("sm_100", ("tcgen05",))[0]


def test_products_of_float32():
    """TF32 on NVIDIA, three for each product; float32 itself on AMD."""
    found = {
        target: compiled(target, Tile(64, 32), 16, torch.float32).report().product
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }
    assert found == {
        "sm_80": "mma.sync tf32",
        "sm_90": "wgmma tf32",
        "sm_100": "tcgen05 tf32",
        "gfx942": "mfma f32",
    }
    ptx = compiled("sm_90", Tile(64, 32, stages=1), 16, torch.float32).binary.asm["ptx"]
    half = compiled("sm_90", Tile(64, 64, stages=1), 32, HALF).binary.asm["ptx"]
    assert ptx.count("wgmma.mma_async") == 3 * half.count("wgmma.mma_async")


# ------------------------------------------------------------------------------------------------- the table


def test_each_kernel_has_a_row_for_every_width_dtype_and_target():
    rows = Counter((row["kernel"], row["width"], row["dtype"], row["target"]) for row in table())
    wanted = {
        (case.kernel, width, tile_search.name_of(dtype), target)
        for case in CASES
        for width in case.widths
        for dtypes in case.dtypes
        for dtype in dtypes
        for target in SHARED_LIMIT
    }
    assert set(rows) == wanted and set(rows.values()) == {1}


def test_no_row_of_the_table_has_a_problem():
    """Without compiling: the committed reports. The files test_compiled_*.py compile them again."""
    for row in table():
        case = CASE[row["kernel"]]
        allowed = tile_search.wanted(case, row["target"], getattr(torch, row["dtype"]))
        assert tuple(row["reports"]) == case.parts(row["width"])
        for report in row["reports"].values():
            assert Report(**report).problems(row["target"], allowed) == [], row


def test_the_launchers_use_the_table(request):
    for target in ("sm_90", "gfx950"):
        row = next(r for r in table() if r["target"] == target and r["width"] == 64)
        tile = Tile(row["n"], row["m"], row["warps"], row["stages"])
        assert chosen(row["kernel"], 64, row["dtype"], target) == tile
        found = compiled(target, None, 64, getattr(torch, row["dtype"]), row["kernel"])
        assert found.binary.metadata.num_warps == tile.warps
        assert found.report() == Report(**row["reports"]["plain"])


def test_a_target_that_the_table_lacks_takes_the_nearest_older_one():
    kernel, name = "attention_forward", "bfloat16"
    assert chosen(kernel, 64, name, "sm_89") == chosen(kernel, 64, name, "sm_80")
    assert chosen(kernel, 64, name, "sm_120") == chosen(kernel, 64, name, "sm_100")
    assert chosen(kernel, 64, name, "gfx90a") == chosen(kernel, 64, name, "gfx942")
    assert chosen(kernel, 48, name, "sm_90") == chosen(kernel, 64, name, "sm_90")


# ------------------------------------------------------------------------------------------------ the search


def fake(reports, monkeypatch, options=("plain",)):
    """A case whose reports are given by (option, tile) instead of a compiler, and the candidates tried."""
    tried = []

    def report(case, width, target, dtype, option, tile):
        tried.append((option, tile))
        return reports(option, tile)

    monkeypatch.setattr(tile_search, "compiled_report", report)
    tiles = [Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), Tile(64, 64, 4, 2)]
    return Case("fake", attention, lambda target: tiles, options), tried


def test_the_search_takes_the_first_candidate_without_a_problem(monkeypatch):
    def reports(option, tile):
        spills = 8 if tile.n == 128 and option == "bias" else 0
        return Report(255, spills, 1000, "wgmma bf16")

    case, tried = fake(reports, monkeypatch, ("plain", "bias"))
    (row,) = tile_search.choose(case, 64, (HALF,), "sm_90")
    assert (row["n"], row["m"], row["warps"], row["stages"]) == (64, 64, 4, 2)
    assert row["reports"]["bias"] == {"registers": 255, "spills": 0, "shared": 1000, "product": "wgmma bf16"}
    assert Tile(128, 64, 4, 1) in [tile for _, tile in tried], "few spills: fewer stages may help"


def test_the_search_prefers_the_best_instruction_and_then_allows_an_older_one(monkeypatch):
    best = {64: "wgmma tf32", 128: "mma.sync tf32"}
    case, _ = fake(lambda option, tile: Report(9, 0, 9, best[tile.n]), monkeypatch)
    (row,) = tile_search.choose(case, 64, (torch.float32,), "sm_90")
    assert row["n"] == 64
    case, _ = fake(lambda option, tile: Report(9, 0, 9, "mma.sync tf32"), monkeypatch)
    (row,) = tile_search.choose(case, 64, (torch.float32,), "sm_90")
    assert row["n"] == 128
    with pytest.raises(LookupError, match="every candidate has a problem"):
        tile_search.choose(case, 64, (HALF,), "sm_90")


def test_a_tile_that_spills_far_is_not_tried_with_fewer_stages(monkeypatch):
    case, tried = fake(lambda option, tile: Report(255, 1000 * (tile.n > 64), 9, "mfma bf16"), monkeypatch)
    tile_search.choose(case, 64, (HALF,), "gfx942")
    assert [tile for _, tile in tried] == [Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)]


def test_candidates_come_from_the_largest_down():
    tiles = CASE["attention_forward"].tiles("sm_90")
    areas = [tile.n * tile.m for tile in tiles]
    assert areas == sorted(areas, reverse=True) and len(tiles) == len(set(tiles))
    keys = CASE["attention_backward_keys"].tiles("sm_90")
    assert keys.index(Tile(64, 128)) < keys.index(Tile(128, 64)), "a program owns the keys"
    assert {tile.stages for tile in CASE["attention_forward"].tiles("gfx942")} == {1, 2}


def test_write_keeps_the_rows_of_other_kernels(monkeypatch, tmp_path):
    def chosen_again(case, width, dtypes, target):
        return [{"kernel": case.kernel, "width": width, "dtype": tile_search.name_of(t)} for t in dtypes]

    monkeypatch.setattr(tile_search, "choose", chosen_again)
    tile_search.write(["attention_backward_slots"], tmp_path / "tiles.json")
    lines = (tmp_path / "tiles.json").read_text().splitlines()
    kept = [row for row in table() if row["kernel"] != "attention_backward_slots"]
    assert len(lines) == 2 + len(table()) and "reports" in lines[1] and "reports" not in lines[-2]
    assert sum("reports" in line for line in lines) == len(kept)
