"""Kernels compiled for GPUs that are not here: what the compilers report, and the table of tiles."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from triton import knobs
from triton.runtime.driver import driver

from memlib_kernels import attention_kernel, gated_write_kernel, tile_search, tiles
from memlib_kernels.ahead_of_time import SHARED_LIMIT, Report, allowed_products, compile_only, own_cache
from memlib_kernels.attention import attention as attend
from memlib_kernels.attention import flash_attention
from memlib_kernels.case import Case
from memlib_kernels.cases import CASES, attention
from memlib_kernels.gated_write import gated_write
from memlib_kernels.interpreter import interpreted
from memlib_kernels.launch import runner
from memlib_kernels.rms_norm import rms_norm, rms_norm_reference
from memlib_kernels.tiles import Tile, chosen, has_tiles, rows_of, stored, table, tile_of

HALF = torch.bfloat16
CASE = {case.kernel: case for case in CASES}
rms_norm_module = importlib.import_module("memlib_kernels.rms_norm")  # the package has a function of its name
README = Path(__file__).parents[2] / "kernels" / "README.md"


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


def named(dtypes):
    return [tile_search.name_of(dtype) for dtype in dtypes]


def test_every_kernel_has_rows_for_each_dtype_and_target_up_to_its_widest():
    """The widths of a kernel without gaps; those that no clean tile serves are missing at the end only."""
    assert {row["kernel"] for row in table()} == set(CASE)
    for case in CASES:
        for dtype in named(dtype for dtypes in case.dtypes for dtype in dtypes):
            for target in SHARED_LIMIT:
                widths = tuple(row["width"] for row in rows_of(case.kernel, dtype, target))
                assert widths and widths == case.widths[: len(widths)], (case.kernel, dtype, target)
    keys = Counter((row["kernel"], row["width"], row["dtype"], row["target"]) for row in table())
    assert set(keys.values()) == {1}


def test_every_kernel_of_the_package_has_a_case():
    folder = Path(attention_kernel.__file__).parent
    launched = {
        name
        for path in folder.glob("*_kernel.py")
        for name in re.findall(r"^def (\w+_(?:forward|backward\w*|later))\(", path.read_text(), re.MULTILINE)
    }
    launched -= {"weights_backward", "read_backward"}  # the launch code of two others
    assert launched == set(CASE)


def test_no_row_of_the_table_has_a_problem():
    """Without compiling: the committed reports. The files test_compiled_*.py compile some of them again."""
    for row in table():
        case = CASE[row["kernel"]]
        allowed = tile_search.wanted(case, row["target"], getattr(torch, row["dtype"]))
        assert tuple(row["reports"]) == case.options
        for report in row["reports"].values():
            assert Report(**report).problems(row["target"], allowed) == [], row


def test_the_tests_compile_every_kernel_for_every_target_and_every_option():
    found = [pair for target in SHARED_LIMIT for pair in tile_search.samples(target)]
    for key in (("kernel", "target"), ("kernel", "dtype"), ("width",)):
        everything = {tuple(row[name] for name in key) for row in table()}
        assert {tuple(row[name] for name in key) for row, _ in found} == everything
    for case in CASES:
        assert {option for row, option in found if row["kernel"] == case.kernel} == set(case.options)


def test_the_reports_are_those_of_these_kernels_and_this_triton():
    assert stored()["triton"] == triton.__version__
    assert stored()["checksums"] == tile_search.checksums(), (
        "kernels have changed since their rows were made: python -m memlib_kernels.tile_search --check"
    )


def test_a_checksum_sees_code_and_no_comments(tmp_path, monkeypatch):
    def checksum(text):
        (tmp_path / "add_kernel.py").write_text(text)
        return tile_search.checksums.__wrapped__()["add"]

    monkeypatch.setattr(tile_search, "PATH", tmp_path / "tiles.json")
    before = checksum('def add(x):\n    """Add."""\n    return x + 1\n')
    assert checksum("def add(x):\n    # why\n    return x + 1\n") == before
    assert checksum("def add(x):\n    return x + 2\n") != before


def test_the_check_notices_what_changed(monkeypatch):
    row = next(row for row in table() if row["kernel"] == "silu_mul_forward")
    assert tile_search.drift(row, "plain") == ""
    wrong = row | {"reports": {"plain": row["reports"]["plain"] | {"registers": 1}}}
    assert "'registers': 1" in tile_search.drift(wrong, "plain")
    kept = []
    monkeypatch.setattr(tile_search, "store", lambda rows, files: kept.append(files))
    monkeypatch.setattr(tile_search, "table", lambda: [wrong])
    assert len(tile_search.check(["silu_mul"])) == 1 and not kept
    monkeypatch.setattr(tile_search, "table", lambda: [row])
    assert tile_search.check(["silu_mul"]) == [] and kept == [["silu_mul"]]


def test_the_readme_prints_the_table_and_what_is_left_to_torch():
    text = README.read_text()
    assert tile_search.summary() in text and tile_search.left_to_torch() in text, (
        "python -m memlib_kernels.tile_search prints another table than kernels/README.md contains"
    )


def test_where_no_tile_is_clean_torch_computes():
    wide, uneven, narrow = (torch.zeros(1, 2, 32, k, dtype=HALF) for k in (512, 40, 64))
    with compile_only("sm_80") as found:
        for q in (wide, uneven, narrow):
            out, lse = flash_attention(q, q, q, causal=True)
            assert out.shape == q.shape and lse.shape == q.shape[:-1]
        keys = narrow[:, :, :31]
        for rows in (32, 1):  # a mask for each query, and one for all
            attend(narrow, keys, keys, torch.ones(rows, 31, dtype=torch.bool))
        slots, gate, values = narrow[0], torch.zeros(2, 5, 32, dtype=HALF), narrow[0, :, :5]
        assert gated_write(slots, gate, gate, values).shape == slots.shape
        assert gated_write(slots[:, :30], gate[..., :30], gate[..., :30], values).shape == (2, 30, 64)
    assert [kernel.name for kernel in found] == ["attention_forward"] * 2 + ["gated_write_forward"]
    with compile_only("sm_80"):
        assert has_tiles("addressed_read", HALF, 64, rows=(1024, 1024))
        assert not has_tiles("addressed_read", HALF, 64, rows=(1024, 93))
        assert not has_tiles("addressed_read", torch.float64, 64) and not has_tiles("silu_mul", torch.float64)
    with interpreted():  # its tiles need no table
        assert has_tiles("attention", HALF, 512, 40)
    with pytest.raises(
        LookupError, match="attention_forward has no tile for 512 numbers of bfloat16 on sm_80"
    ):
        chosen("attention_forward", 512, "bfloat16", "sm_80")


def test_a_row_that_is_not_aligned_may_not_fit():
    """Why `has_tiles` refuses 1021 slots."""
    slots, gate, values = (
        torch.empty(2, *size, device="meta") for size in ((1021, 64), (512, 1021), (512, 64))
    )
    with compile_only("gfx942", only="gated_write_backward_slots") as found:
        gated_write_kernel.backward(slots, slots, gate, gate, values)
    (problem,) = found[0].report().problems("gfx942", ("mfma",))
    assert "shared memory" in problem


def test_the_compiler_of_torch_traces_the_choice(monkeypatch):
    monkeypatch.setattr(rms_norm_module, "runs_triton", lambda *tensors: True)  # as on a GPU
    monkeypatch.setattr(tiles, "target", lambda: "sm_90")
    run = torch.compile(lambda x, weight: rms_norm(x, weight), fullgraph=True, backend="eager")
    for width in (2**14, 40):
        x, weight = torch.randn(3, width), torch.ones(width)
        torch.testing.assert_close(run(x, weight), rms_norm_reference(x, weight))
    with pytest.raises(RuntimeError, match="active drivers"):  # a kernel was to start
        run(torch.randn(3, 64), torch.ones(64))


def test_the_width_of_an_operation_is_that_of_its_worst_kernel(monkeypatch):
    rows = [row for row in table() if row["kernel"] != "attention_backward_keys" or row["width"] < 64]
    monkeypatch.setattr(tiles, "table", lambda: rows)
    tiles.widest_row.cache_clear()
    with compile_only("sm_90"):
        assert has_tiles("attention", HALF, 32) and not has_tiles("attention", HALF, 32, 64)
    tiles.widest_row.cache_clear()


def test_the_launchers_use_the_table(request):
    for target in ("sm_90", "gfx950"):
        row = next(r for r in table() if r["target"] == target and r["width"] == 64)
        tile = tile_of(row)
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
    return Case("fake", attention, lambda target, width: tiles, options), tried


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
    assert tile_search.choose(case, 64, (HALF,), "sm_90") == []


def test_a_tile_that_spills_far_is_not_tried_with_fewer_stages(monkeypatch):
    case, tried = fake(lambda option, tile: Report(255, 900 * (tile.n > 64), 9, "mma.sync bf16"), monkeypatch)
    tile_search.choose(case, 64, (HALF,), "sm_80")
    assert [tile for _, tile in tried] == [Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)]


def test_a_wider_row_exceeds_neither_tile_nor_instruction_of_a_narrower_one(monkeypatch):
    case, tried = fake(lambda option, tile: Report(9, 0, 9, "mma.sync tf32"), monkeypatch)
    narrower = {"n": 64, "m": 64, "warps": 4, "stages": 2, "reports": {"plain": {"product": "mma.sync tf32"}}}
    (row,) = tile_search.choose(case, 128, (torch.float32,), "sm_90", narrower)
    assert [tile for _, tile in tried] == [tile_of(row)] == [Tile(128, 64, 4, 1)], (
        "of one stage: half the size"
    )


def test_widths_end_where_no_tile_is_clean(monkeypatch, capsys):
    case, _ = fake(lambda option, tile: Report(9, 0, 9, "mma.sync bf16"), monkeypatch)
    monkeypatch.setattr(
        tile_search, "choose", lambda case, width, *rest: [a_row(width)] if width < 64 else []
    )
    rows = tile_search.rows_of_widths(case, (HALF,), "sm_80")
    assert [row["width"] for row in rows] == [16, 32]


def a_row(width):
    return {"width": width, "n": 16, "m": 16, "warps": 4, "stages": 1}


def test_candidates_come_from_the_largest_down():
    found = CASE["attention_forward"].tiles("sm_90", 64)
    sizes = [tile.n * tile.m * (2 if tile.stages > 1 else 1) for tile in found]
    assert sizes == sorted(sizes, reverse=True) and len(found) == len(set(found))
    keys = CASE["attention_backward_keys"].tiles("sm_90", 64)
    assert keys.index(Tile(64, 128)) < keys.index(Tile(128, 64)), "a program owns the keys"
    assert {tile.stages for tile in CASE["attention_forward"].tiles("gfx942", 64)} == {1, 2}
    rows = CASE["norm_forward"]
    assert rows.tiles("sm_90", 64)[0].n == 64 and {tile.n for tile in rows.tiles("sm_90", 8192)} == {1}


def test_write_keeps_the_rows_of_other_kernels(monkeypatch, tmp_path):
    kept = [row for row in table() if not row["kernel"].startswith("silu_mul")]

    def chosen_again(case, width, dtypes, target, narrower):
        return [
            {"kernel": case.kernel, "width": width, "dtype": dtype} | a_row(width) for dtype in named(dtypes)
        ]

    monkeypatch.setattr(tile_search, "choose", chosen_again)
    monkeypatch.setattr(tile_search, "checksums", lambda: dict.fromkeys(stored()["checksums"], "new"))
    tile_search.write(["silu_mul"], tmp_path / "tiles.json")
    written = json.loads((tmp_path / "tiles.json").read_text())
    rows = written["tiles"]
    assert len(rows) == len(table()) and sum("reports" in row for row in rows) == len(kept)
    assert [row["kernel"] for row in rows] == [row["kernel"] for row in table()]
    assert written["checksums"] == stored()["checksums"] | {"silu_mul": "new"}
