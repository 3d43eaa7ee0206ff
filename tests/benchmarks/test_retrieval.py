"""Retrieval against raw FAISS on the same vectors and index, both in turns in one run."""

from __future__ import annotations

import pytest

from memlib.evaluation.retrieval import measure_index

MOST = 1.15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "ivf", "hnsw"])
def test_a_store_adds_little_to_faiss(name):
    """100,000 keys of width 64, 64 queries, 32 hits; keys and values of the hits included."""
    result = measure_index(name, 100_000, repeats=31)
    print(result)
    assert result.overhead is not None and result.overhead <= MOST
