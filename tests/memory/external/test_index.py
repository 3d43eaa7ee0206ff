"""Search: the exact path, FAISS's indexes, and what they must agree on."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from memlib.config import IndexConfig
from memlib.memory.external.index import LEAST, SearchIndex, pq_parts
from memlib.ops import exact_search

KINDS = ("flat", "ivf", "ivfpq", "hnsw")


def vectors(rows, dim=16, seed=0):
    drawn = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def built(kind, stored, steps=None):
    index = SearchIndex(IndexConfig(kind=kind), stored.shape[1])
    for total in steps or [len(stored)]:
        index.cover(total, lambda start, stop: stored[start:stop])
    return index


def test_exact_search_is_faiss_flat():
    stored, query = vectors(700), vectors(9, seed=1)
    flat = faiss.IndexFlatIP(16)
    flat.add(stored)
    _, want = flat.search(query, 20)
    score = torch.from_numpy(query @ stored.T)[None, None]
    got = exact_search(score, torch.zeros(1, 700, dtype=torch.int64), 20)
    assert torch.equal(got[0, 0], torch.from_numpy(want))


def test_of_equal_scores_the_newest_come_first_and_empty_places_last():
    serial = torch.tensor([[4, 1, -1, 3, 2, -1, 0]])
    score = torch.zeros(1, 1, 1, 7)
    score[..., [2, 5]] = 9.0  # what is empty may hold anything
    assert exact_search(score, serial, 6)[0, 0, 0].tolist() == [0, 3, 4, 1, 6, -1]


def test_chunks_come_back_whole_by_their_mean_score_when_all_their_tokens_are_there():
    score = torch.tensor([5.0, 5, 0, 4, 8, 8, 1, 2, 9, 9, 9, 9]).view(1, 1, 1, 12)
    serial = torch.tensor([[6, 7, 8, 9, 4, 5, 0, 1, 2, -1, 11, 3]])
    # The chunks' means are 5, 2, 8, 1.5, 9, 9; the fifth lacks a token, the sixth mixes two.
    place = exact_search(score, serial, 12, chunk=2)[0, 0, 0].tolist()
    assert place == [4, 5, 0, 1, 2, 3, 6, 7, -1, -1, -1, -1]


def test_the_flat_index_is_exact():
    stored, query = vectors(3 * LEAST), vectors(40, seed=1)
    want = np.argsort(-(query @ stored.T), axis=1)[:, :10]
    score, place = built("flat", stored).search(query, 10)
    np.testing.assert_array_equal(place, want)
    np.testing.assert_allclose(score, np.take_along_axis(query @ stored.T, want, 1), rtol=1e-5)


@pytest.mark.parametrize(("kind", "least"), [("ivf", 0.9), ("ivfpq", 0.3), ("hnsw", 0.95)])
def test_approximate_indexes_find_most_of_the_true_neighbours(kind, least):
    stored, query = vectors(4 * LEAST), vectors(50, seed=1)
    want, got = (built(k, stored).search(query, 10)[1] for k in ("flat", kind))
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(want, got, strict=True)])
    assert recall >= least


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_a_function_of_its_vectors_however_they_came(kind):
    stored = vectors(4 * LEAST + 5)
    at_once, in_steps = (
        built(kind, stored),
        built(kind, stored, [10, LEAST + 3, LEAST + 70, 2 * LEAST, len(stored)]),
    )
    assert at_once.size == in_steps.size == (4 * LEAST if kind == "hnsw" else len(stored))
    np.testing.assert_array_equal(at_once.to_bytes(), in_steps.to_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_bring_an_index_back(kind):
    stored, query = vectors(3 * LEAST), vectors(9, seed=1)
    index = built(kind, stored[: 2 * LEAST])
    copy = SearchIndex(index.config, 16)
    copy.from_bytes(index.to_bytes(), index.trained_on)
    for one in (index, copy):
        one.cover(len(stored), lambda start, stop: stored[start:stop])
    np.testing.assert_array_equal(copy.search(query, 5)[1], index.search(query, 5)[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", ["a_few", "a_prefix", "all_but_two", "all"])
def test_only_visible_places_come_back(kind, hidden):
    stored = vectors(LEAST)
    visible = np.ones(LEAST, dtype=bool)
    places = {"a_few": [3, 50, 200], "a_prefix": range(100), "all_but_two": range(2, LEAST)}
    visible[list(places.get(hidden, range(LEAST)))] = False
    _, found = built(kind, stored).search(stored[:20], 5, visible)
    assert visible[found[found >= 0]].all()
    if hidden == "all":
        assert (found == -1).all()


def test_product_quantisation_uses_a_divisor_of_the_width():
    assert [pq_parts(64, 16), pq_parts(10, 16), pq_parts(12, 7), pq_parts(7, 3)] == [16, 10, 6, 1]
