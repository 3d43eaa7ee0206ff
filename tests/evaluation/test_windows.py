"""The cost of a sliding window: what is measured, and the stored measurement with the claims made of it."""

from __future__ import annotations

import json
from pathlib import Path

from memlib.evaluation import windows
from memlib.evaluation.windows import WINDOWS, WindowCost, gigaflops, measure_all, to_table

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "docs/results/windows.json").read_text(encoding="utf-8"))
RESULTS = [WindowCost(**row) for row in STORED["results"]]


def test_every_window_is_measured_for_attention_and_model(monkeypatch):
    monkeypatch.setattr(windows, "TOKENS", 32)
    monkeypatch.setattr(windows, "WINDOWS", (None, 4))
    found = measure_all(log=lambda line: None, rounds=1)
    assert [(r.part, r.window) for r in found] == [(p, w) for p in ("attention", "model") for w in (None, 4)]
    assert all(r.seconds > 0 and r.bytes > 0 and r.gigaflops >= 0 for r in found)
    assert to_table(found).count("1.00 ") >= 4


def test_operations_are_those_of_the_blocks():
    per_score = 14 * 64 * 4 * 8 / 1e9
    assert gigaflops(None) == per_score * 1024 * 1025 / 2
    assert gigaflops(128) == per_score * 1024 * 256
    assert gigaflops(512) == per_score * 1024 * 1024


def test_the_stored_results_are_of_these_windows_and_in_the_diary():
    assert [r.window for r in RESULTS] == [*WINDOWS, *WINDOWS]
    assert to_table(RESULTS) in (ROOT / "docs/diary.md").read_text(encoding="utf-8")


def test_a_window_of_128_tokens_saves_time_and_costs_memory():
    full, narrow = ([r for r in RESULTS if r.window == window] for window in (None, 128))
    assert all(b.seconds < a.seconds and b.bytes > a.bytes for a, b in zip(full, narrow, strict=True))
