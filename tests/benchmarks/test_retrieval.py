"""Retrieval against raw FAISS on the same vectors and index, both in turns in one run."""

from __future__ import annotations

import pytest

from memlib.evaluation.retrieval import measure_index

# Queries of a batch and the most that a store may take, as a multiple of FAISS's search alone. 512 is a
# segment by default. A store also fetches the hits' keys and values, and for ivfpq their true scores:
# beside a short search of few queries that shows (docs/diary.md).
MOST = {
    ("flat", 64): 1.15,
    ("hnsw", 64): 1.15,
    ("ivf", 64): 1.3,
    ("ivf", 512): 1.15,
    ("ivfpq", 64): 1.5,
    ("ivfpq", 512): 1.2,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "queries"), MOST)
def test_a_store_adds_little_to_faiss(name, queries):
    """100,000 keys of width 64, 32 hits a query; processor time of one thread."""
    result = measure_index(name, 100_000, queries=queries, repeats=31)
    print(result)
    assert result.overhead is not None and result.overhead <= MOST[name, queries]
