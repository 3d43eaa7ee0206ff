"""How exponents are fitted, what is counted, and the stored measurement with the claims made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memlib.evaluation import complexity
from memlib.evaluation.complexity import (
    Exponent,
    Law,
    laws,
    measure,
    measure_all,
    peak_bytes,
    slope,
    to_table,
)

STORED = Path(__file__).parents[2] / "docs/results/complexity.json"
RESULTS = [Exponent(**row) for row in json.loads(STORED.read_text(encoding="utf-8"))["results"]]


def test_the_slope_of_a_power_is_its_exponent():
    sizes = [3, 5, 11, 40]
    assert slope(sizes, [7 * x**1.5 for x in sizes]) == pytest.approx(1.5)
    assert slope(sizes, [4.0] * 4) == pytest.approx(0.0)


def test_peak_bytes_counts_what_is_alive_at_once():
    assert peak_bytes(lambda: torch.empty(1000)) == 4000
    assert peak_bytes(lambda: torch.empty(1000).clone()) == 8000
    assert peak_bytes(lambda: [torch.empty(1000).sum() for _ in range(5)]) < 2 * 4000 + 100


def test_operations_and_bytes_of_the_tiled_kernel():
    (operations,) = (law for law in laws() if law.quantity == "operations")
    n, d = 128, 64
    assert measure("operations", operations.make(32), 32) == 4 * n * n * d
    (moved,) = (law for law in laws() if law.quantity == "bytes")
    by_block = [measure("bytes", moved.make(block), block) for block in (32, 64)]
    keys = [2 * n * d * 4 * (n // block) for block in (32, 64)]  # each tile of queries loads all keys, values
    assert [b - k for b, k in zip(by_block, keys, strict=True)] == [2 * n * d * 4 + n * 4] * 2


def test_a_law_is_measured_and_fitted(monkeypatch):
    def quadratic(size):
        return lambda: torch.empty(size, size)

    one = Law("matrix", "O(n²)", "memory", "n", 2.0, (8, 16, 32), quadratic)
    monkeypatch.setattr(complexity, "laws", lambda: [one])
    (result,) = measure_all(2, log=lambda line: None)
    assert (result.mean, result.half) == (2.0, 0.0)
    assert "| matrix | memory | O(n²) | n | 8 … 32 | 2 | 2.00 ± 0.00 |" in to_table([result])


def test_the_stored_results_are_of_the_laws_in_the_code():
    def key(one):
        return one.name, one.stated, one.quantity, one.axis, one.expected, list(one.sizes)

    assert [key(result) for result in RESULTS] == [key(law) for law in laws()]


def found(name, quantity, axis):
    (result,) = (r for r in RESULTS if (r.name, r.quantity, r.axis) == (name, quantity, axis))
    return result.mean


def test_what_the_documents_state_and_what_is_measured():
    for name in ("standard attention", "flash attention"):
        assert found(name, "time", "n") == pytest.approx(2.0, abs=0.5)
        assert 0.7 < found(name, "time", "d") < 1.2
    assert found("standard attention", "memory", "n") == pytest.approx(2.0, abs=0.05)
    assert 0.7 < found("flash attention", "memory", "n") < 1.1
    # A larger tile makes no fewer operations; it moves fewer bytes.
    assert found("flash attention", "operations", "B") == pytest.approx(0.0, abs=0.01)
    assert -1.0 < found("flash attention", "bytes", "B") < -0.6
    stored, not_stored = "memory attention, weights stored", "memory attention, weights not stored"
    assert found(stored, "memory", "m") == pytest.approx(1.0, abs=0.1)
    assert found(not_stored, "memory", "m") == pytest.approx(0.0, abs=0.1)
    for axis in ("n", "m", "d"):
        assert found(not_stored, "time", axis) == pytest.approx(1.0, abs=0.2)
    # Compression is linear in d only while the slots keep their width.
    assert found("memory compression, slots of 64", "time", "d") < 1.2
    assert found("memory compression, slots of d / 2", "time", "d") > 1.5
