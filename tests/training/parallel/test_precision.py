"""bf16 and fp16 train like float32 in every layout; an overflow on one process is left out by all."""

import json
import re

import pytest

from tests.training.parallel.started import run_module

LAYOUTS = ("ddp", "fsdp", "tensor", "1f1b")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    run_module("mixed", folder, timeout=300)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("precision", "rounding"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_losses_differ_from_float32_by_rounding(results, precision, rounding, layout):
    for want, got in zip(results["none"], results[f"{precision} {layout}"], strict=True):
        assert 0 < abs(got["loss"] - want["loss"]) < rounding * want["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_on_one_process_is_left_out_by_all(results, layout):
    for records in results[f"overflow {layout}"]:
        assert [record["loss_scale"] for record in records] == [2**16, 2**15, 2**15, 2**15]
        assert records[1]["unchanged"]
        assert records[3]["loss"] == pytest.approx(results["none"][3]["loss"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_number_that_is_none_on_one_process_stops_all_and_is_named(results, layout):
    first, second = results[f"diverged {layout}"]
    assert first == second and "step 1: loss nan" in first
    assert "rank 0: all weights are finite" in first
    assert re.search("rank 1: .*first bad output in the forward pass: of blocks.0.mlp", first)
