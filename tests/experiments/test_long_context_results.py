"""The stored comparison of short windows with a memory: its arms are those in the code, its claims hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

from memlib.experiments.long_context import ARMS, DISTANCES, configured, to_table

RESULTS = json.loads(
    (Path(__file__).parents[2] / "docs/results/long_context.json").read_text(encoding="utf-8")
)
MANY_SEEDS = ("base", "window", "external")


def runs(arm):
    return [r for r in RESULTS if r["arm"] == arm]


def test_results_are_of_the_arms_in_the_code():
    assert {r["arm"] for r in RESULTS} == set(ARMS)
    for arm in ARMS:
        seeds = sorted(r["seed"] for r in runs(arm))
        assert seeds == ([0, 1, 2] if arm in MANY_SEEDS else [0])
        assert all(set(r["by_distance"]) == {str(d) for d in DISTANCES} for r in runs(arm))
        assert all(r.get("rate", 0.0) == ARMS[arm].rate for r in runs(arm))
    assert configured("external").model.segment_length == 256


def test_the_external_memory_brings_back_what_the_window_lost():
    for memory, window, base in zip(*map(runs, ("external", "window", "base")), strict=True):
        assert window["all"]["accuracy"] == 0
        assert memory["all"]["accuracy"] > base["all"]["accuracy"] + 0.1
        assert all(row["accuracy"] >= 0.4 for row in memory["by_distance"].values())
        assert memory["memory_bytes"] + memory["cache_bytes"] < 0.1 * base["cache_bytes"]
        assert memory["found"] >= 0.8


def test_neither_slots_nor_a_plain_start_do():
    for arm in ("internal", "external_plain"):
        assert all(r["all"]["accuracy"] < 0.05 for r in runs(arm))


def test_the_table_has_a_row_for_each_arm():
    lines = to_table(RESULTS).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(ARMS)
