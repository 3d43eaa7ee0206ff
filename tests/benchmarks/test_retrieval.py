"""Retrieval against raw FAISS on the same vectors and index, both in turns in one run."""

from __future__ import annotations

import pytest

from memlib.evaluation.retrieval import measure_index

# The hits' keys and values are fetched too, which FAISS does not do: beside IVF's short search it shows.
MOST = {"flat": 1.15, "hnsw": 1.15, "ivf": 1.5}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST)
def test_a_store_adds_little_to_faiss(name):
    """100,000 keys of width 64, 64 queries, 32 hits; processor time of one thread."""
    result = measure_index(name, 100_000, repeats=31)
    print(result)
    assert result.overhead is not None and result.overhead <= MOST[name]
