"""The speed of exported models: how it is measured, and the stored measurement with the claims made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memlib.config import load_config
from memlib.evaluation import compiled
from memlib.evaluation.compiled import SETTINGS, Speed, measure, to_table
from memlib.inference.export import Step

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "docs/results/compiled_cpu.json").read_text(encoding="utf-8"))
RESULTS = [Speed(**row) for row in STORED["results"]]


@pytest.mark.parametrize(("forgets", "same"), [(False, True), (True, False)])
def test_both_read_the_same_segments_with_a_state_each(monkeypatch, forgets, same):
    """The step as it is before it is compiled; one that begins anew in each segment has other logits."""

    def export_step(model, path, streams):
        step = Step(model, streams)

        def run(ids, mask, start, *state):
            return step(ids, mask, torch.ones_like(start) if forgets else start, *state)

        monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda _: run)
        return path

    monkeypatch.setattr(compiled, "export_model", export_step)
    result = measure(load_config("recall_internal"), "recall_internal", 2, rounds=2)
    assert (result.name, result.streams, result.segment_length) == ("recall_internal", 2, 16)
    assert result.eager > 0 and result.compiled > 0 and (result.difference < 1e-5) == same


def test_the_stored_results_are_of_the_settings_in_the_code_and_in_the_diary():
    assert [(r.name, r.streams) for r in RESULTS] == list(SETTINGS)
    assert all(r.segment_length == load_config(r.name).model.segment_length for r in RESULTS)
    assert to_table(RESULTS) in (ROOT / "docs/diary.md").read_text(encoding="utf-8")


def test_exported_models_are_equal_and_not_slower():
    assert all(r.difference < 1e-5 and r.compiled > r.eager for r in RESULTS)
