"""Batches of documents: padding and waiting, as stored and as measured again."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from memlib.evaluation import balance

STORED = json.loads((Path(__file__).parents[2] / "docs/results/balance.json").read_text(encoding="utf-8"))


def test_the_stored_shares_come_out_again():
    assert [asdict(result) for result in balance.measure_all(lambda line: None)] == STORED["results"]


@pytest.mark.parametrize("seed", balance.SEEDS)
def test_lanes_and_buckets_compute_little_that_is_no_document(seed):
    of = {result["name"]: result for result in STORED["results"] if result["seed"] == seed}
    assert set(of) == set(balance.WAYS)
    for name in ("lanes", "buckets"):
        assert of[name]["padding"] < 0.04 and of[name]["idle"] < 0.01
    assert (
        of["a document a row, in order"]["padding"] > 0.7 and of["a document a row, in order"]["idle"] > 0.45
    )
    assert of["a piece a row, in order"]["padding"] > 0.4
    assert of["lanes, documents in turn"]["padding"] > 0.25


def test_shares_of_a_batch_counted_by_hand():
    """Segments of 64: rows of 1, 3 | 1, 1 | 2, 2 | 1, 2 segments on four ranks of two rows."""
    rows = [[64], [64, 65], [10], [64], [100], [128], [1], [65]]
    found = balance.measure("by hand", 0, [rows])
    computed = (2 * 3 + 2 * 1 + 2 * 2 + 2 * 2) * 64
    assert found.padding == 1 - np.sum([sum(row) for row in rows]) / computed
    assert found.idle == 1 - computed / (4 * 2 * 3 * 64)


@pytest.mark.parametrize("name", balance.WAYS)
def test_every_token_is_read_once(name):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5000, 100)
    read = sum(sum(row) for batch in balance.WAYS[name](lengths, rng) for row in batch)
    assert read == lengths.sum()
