"""The stored comparison of ways to teach facts: of the arms in the code, with the claims made of it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from statistics import mean

import nbformat
import pytest

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

from memlib.experiments.taught_facts import ARMS, UNTRAINED, best_rate, to_table

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "docs/results/facts.json").read_text(encoding="utf-8"))
EDITS = json.loads((ROOT / "docs/results/facts_edit.json").read_text(encoding="utf-8"))


def runs(arm):
    rate = best_rate(RESULTS, arm) if arm in ARMS else None
    return [r for r in RESULTS if (r["arm"], r.get("rate")) == (arm, rate)]


def base(seed):
    (found,) = (r for r in RESULTS if r["arm"] == "base" and r["seed"] == seed)
    return found


def test_results_are_of_the_arms_in_the_code():
    assert {r["arm"] for r in RESULTS} == {*ARMS, *UNTRAINED}
    for arm, made in ARMS.items():
        assert {r["rate"] for r in RESULTS if r["arm"] == arm} == set(made.rates)
        assert {r["steps"] for r in RESULTS if r["arm"] == arm} == {made.steps}
    for arm in (*ARMS, *UNTRAINED):
        assert sorted(r["seed"] for r in runs(arm)) == [0, 1, 2], arm


def test_a_written_memory_recalls_and_breaks_nothing():
    for run in runs("facts"):
        assert run["taught"] >= 0.98
        assert run["unseen"] >= 0.7
        for text in ("prose", "code"):
            assert abs(run[text] - base(run["seed"])[text]) < 0.01


def test_it_is_ahead_of_lora_at_equal_numbers_and_of_the_learned_memory():
    for arm in ("lora", "learned"):
        for mine, other in zip(runs("facts"), runs(arm), strict=True):
            assert abs(mine["parameters"] - other["parameters"]) < 2000
            assert mine["unseen"] > other["unseen"] and mine["taught"] > other["taught"]


def test_an_always_on_memory_breaks_other_text():
    for run in runs("always_on"):
        assert run["prose"] - base(run["seed"])["prose"] > 0.5


def test_editing_facts_leaves_the_others_alone():
    (facts,) = (e for e in EDITS if e["arm"] == "facts")
    assert facts["kept"] == facts["before"]
    assert facts["replaced"]["taught"] >= 0.9 and facts["deleted"]["taught"] <= 0.05


def test_readme_and_diary_show_the_stored_table():
    for page in ("docs/diary.md",):
        assert to_table(RESULTS) in (ROOT / page).read_text(encoding="utf-8")


def test_the_notebook_shows_the_means_of_the_stored_runs():
    notebook = nbformat.read(ROOT / "notebooks/10_pretrained.ipynb", as_version=4)
    (cell,) = (c for c in notebook.cells if c.source.startswith("RESULTS = "))
    shown = ast.literal_eval(ast.parse(cell.source).body[0].value)
    assert shown
    for arm, values in shown.items():
        found = runs(arm)
        measured = [mean(r[name] for r in found) for name in ("taught", "unseen")]
        measured += [mean(r[text] - base(r["seed"])[text] for r in found) for text in ("prose", "code")]
        assert values[:-1] == pytest.approx(measured, abs=6e-4), arm
        assert values[-1] == pytest.approx(mean(r["cpu_seconds"] for r in found), abs=0.06), arm
