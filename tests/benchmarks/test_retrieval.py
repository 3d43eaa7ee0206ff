"""Retrieval against raw FAISS on the same vectors and index, both in turns in one run."""

from __future__ import annotations

import pytest

from memlib.evaluation.retrieval import measure_index

# Queries of a batch and the most that a store may take, as a multiple of FAISS's search alone. 512 is a
# segment by default. A store also fetches the hits' values, and for ivfpq reads their keys for the true
# scores: beside a search of five milliseconds that shows (docs/diary.md).
MOST = {
    ("flat", 64): 1.15,
    ("hnsw", 64): 1.15,
    ("ivf", 64): 1.15,
    ("ivf", 512): 1.15,
    ("ivfpq", 64): 1.4,
    ("ivfpq", 512): 1.15,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "queries"), MOST)
def test_a_store_adds_little_to_faiss(name, queries):
    """100,000 keys of width 64, 32 hits a query; processor time of one thread."""
    result = measure_index(name, 100_000, queries=queries, repeats=31)
    print(result)
    assert result.overhead is not None and result.overhead <= MOST[name, queries]
