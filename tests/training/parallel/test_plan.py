"""Estimates of memory agree with real runs; bytes of parameters are exact; other models are refused."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from memlib.cli import main
from memlib.config import ConfigError, load_config, override
from memlib.models import MemoryTransformer
from memlib.training.parallel.allocations import Allocations
from memlib.training.parallel.plan import advice, make_plan
from tests.training.parallel.started import run_module

ROOT = Path(__file__).parents[3]
FSDP = {"parallel.distributed_strategy": "fsdp"}


def planned(name, ranks, changes=None, **options):
    return make_plan(override(load_config(name), changes or {}), ranks, **options)


@pytest.mark.slow
def test_estimates_agree_with_the_allocators_peak_in_real_runs(tmp_path):
    run_module("peak", tmp_path, timeout=400)
    peaks = json.loads((tmp_path / "peaks.json").read_text(encoding="utf-8"))
    assert len(peaks) == 4
    for name, (estimate, real) in peaks.items():
        assert abs(estimate - real) <= 0.1 * real, (name, estimate, real)


def test_allocations_are_counted_while_they_live():
    with Allocations() as allocations:
        first = torch.zeros(1000)
        second = first + 1  # 8000 bytes are held
        del first
        second = second.view(10, 100) * 2  # the same
        third = torch.zeros(500)  # 6000
        third.untyped_storage().resize_(0)
        third.untyped_storage().resize_(40_000)  # 44,000
        kinds = {"third": allocations.of([third]), "second": allocations.of([second[1], second])}
        del second
    assert allocations.peak(kinds) == {"third": 40_000, "second": 4000, "rest": 0}
    assert allocations.resized == kinds["third"]


def test_parameters_gradients_and_optimizer_are_divided_among_ranks():
    with torch.device("meta"):
        count = sum(p.numel() for p in MemoryTransformer(load_config("recall_internal")).parameters())
    sizes = {"training.batch_size": 32, "training.gradient_accumulation_steps": 2}
    for changes, share in (({}, 1), (FSDP, 4)):
        plan = planned("recall_internal", 4, changes | sizes)
        assert sum(plan.parameters.values()) == count and plan.rows == 8
        exact = 4 * count / share
        for kind, factor in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
            assert abs(plan.held[kind] / factor - exact) <= 0.02 * exact, (kind, share)  # rows are padded


def test_options_that_save_memory_save_what_they_say():
    plain = planned("recall_internal", 2, FSDP)
    assert (
        planned("recall_internal", 2, FSDP | {"parallel.reshard_after_forward": True}).held["gathered"]
        < (plain.held["gathered"])
    )
    for option in ({"training.gradient_checkpointing": True}, {"training.horizon": 1}):
        assert (
            planned("recall_internal", 2, FSDP | option).held["activations"] < 0.7 * plain.held["activations"]
        )
    assert plain.measured and plain.fits and not planned("recall_internal", 2, FSDP, memory_gib=0.001).fits


def test_tensor_and_pipeline_sizes_divide_parameters_and_leave_an_upper_bound_of_activations():
    alone = planned("recall_internal", 1)
    for sizes in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        plan = planned("recall_internal", 2, {f"parallel.{name}": size for name, size in sizes.items()})
        assert not plan.measured
        assert 0.5 * alone.held["weights"] < plan.held["weights"] < 0.8 * alone.held["weights"]
        assert plan.held["activations"] == alone.held["activations"]


def test_eight_layers_of_the_7b_design_at_64_ranks():
    """A rank holds 1/64 of the weights; the memory's state is the whole design's, 24 MiB a row."""
    config = override(load_config("design_7b"), {"model.num_layers": 8, "model.segment_length": 512})
    plan = make_plan(config, 64)
    assert plan.rows == 1 and plan.tokens == 1024
    assert abs(plan.held["weights"] * 64 / 4 / sum(plan.parameters.values()) - 1) < 0.01
    assert 24 <= plan.held["state"] / 2**20 < 25


def test_the_stored_plan_is_of_the_shipped_design():
    stored = json.loads((ROOT / "docs/results/plan_7b.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = MemoryTransformer(load_config("design_7b"))
    assert sum(stored["parameters"].values()) == sum(p.numel() for p in model.parameters())
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    for size in (*stored["held"].values(), sum(stored["held"].values()), sum(stored["update"].values())):
        assert f"{size / 2**30:.2f}" in page


def test_what_cannot_be_planned_is_refused(capsys):
    assert main(["plan", "recall_external"]) == 2
    said = capsys.readouterr().err
    assert "memory.kinds = ['external']" in said and "values of tensors" in said
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match="rows are divided among 3 data-parallel ranks"):
        planned("recall_internal", 3)
    with pytest.raises(ConfigError, match="share a HdsMemory's state"):
        planned("design_7b", 2, {"parallel.pipeline_parallel_size": 2, "model.segment_length": 64})


def test_the_table_says_what_is_largest_and_what_helps(capsys, tmp_path):
    assert main(["plan", "recall_baseline", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    assert "fits in 80 GiB: yes; the largest part is activations" in said
    assert "training.gradient_checkpointing=true" in said
    config = load_config("design_7b")
    plan = planned("recall_baseline", 1)
    assert "gradient_checkpointing" not in advice(plan, config)
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["ranks"] == 1
