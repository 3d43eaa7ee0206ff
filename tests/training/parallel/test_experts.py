"""Expert parallelism: what a rank holds and sends, equal gradients, and what is refused.

That it trains like one process, in every layout, is held by test_layouts.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memlib.config import Config, ConfigError, override
from memlib.models import MemoryTransformer
from memlib.training.parallel import plan
from memlib.training.parallel.experts import divide_chapters
from memlib.training.parallel.ranks import Ranks
from tests.training.parallel import experts

ROOT = Path(__file__).parents[3]
STORED = json.loads((ROOT / "docs/results/experts.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_stored_results_are_what_two_processes_give():
    """Counts are exact; gaps are rounding."""
    assert STORED["sizes"] == experts.SIZES and STORED["processes"] == experts.WORLD
    found = experts.measure()
    for name, result in found.items():
        assert result.pop("gradient_gap") < 1e-9
        stored = dict(STORED["results"][name])
        assert stored.pop("gradient_gap") < 1e-9 and stored == result, name


def test_a_rank_holds_half_the_chapters_and_sends_less_than_gathering_them():
    results = STORED["results"]
    for strategy in ("ddp", "fsdp"):
        plain, divided = results[strategy], results[f"{strategy}, experts"]
        assert divided["token_bytes"] == results["ddp"]["token_bytes"] // 2
        assert divided["optimizer_bytes"] == results["ddp"]["optimizer_bytes"] // 2
        assert "alltoall_base" not in plain["messages"]
    assert 2 * results["fsdp, experts"]["sent_bytes"] < results["fsdp"]["sent_bytes"]


CHAPTERS = {"memory.kinds": ["chapters"], "memory.memory_layer_placement": "all"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"memory.kinds = \[\] has no chapters"),
        (CHAPTERS | {"memory.chapters.use_chapters": False}, "has no chapters that a router selects"),
        (
            CHAPTERS | {"memory.chapters.num_chapters": 1, "memory.chapters.top_k_chapters": 1},
            "2 data-parallel",
        ),
        (CHAPTERS | {"memory.chapters.quantize_memory": True}, "must not be rounded"),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    small = {"model.num_layers": 1, "model.vocab_size": 64, "training.batch_size": 2}
    config = override(Config(), small | {"parallel.expert_parallel": True} | changes)
    with pytest.raises(ConfigError, match=said), plan.fake_ranks(config, 2):
        pass


def test_a_pipeline_and_a_plan_are_refused():
    config = override(Config(), CHAPTERS | {"parallel.expert_parallel": True})
    with pytest.raises(ConfigError, match="how many queries a rank receives"):
        plan.make_plan(config, 2)
    with pytest.raises(ConfigError, match="pipeline_parallel_size = 2 each microbatch would wait"):
        override(
            Config(), CHAPTERS | {"parallel.expert_parallel": True, "parallel.pipeline_parallel_size": 2}
        )


def test_one_process_keeps_all_chapters():
    model = MemoryTransformer(override(Config(), CHAPTERS | {"model.num_layers": 1, "model.vocab_size": 64}))
    assert divide_chapters(model, Ranks(torch.device("cpu")), None) == set()
    assert "read_chapters" not in vars(model.block(0).memories.memory_list[0])
