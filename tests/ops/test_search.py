"""Exact search: order, ties, chunks, empty places."""

from __future__ import annotations

import sys

import pytest
import torch

from memlib.ops import TIE, exact_search, exact_search_reference, nearest, nearest_reference


def inputs(b=2, h=3, n=9, c=40, empty=7):
    torch.manual_seed(c)
    score = torch.rand(b, h, n, c, dtype=torch.float64)
    serial = torch.stack([torch.randperm(c) for _ in range(b)])
    serial[:, c - empty :] = -1
    return score, serial


@pytest.mark.parametrize("top_k", [1, 8, 33, 40])
@pytest.mark.parametrize("empty", [0, 7, 40])
def test_equals_its_reference(top_k, empty):
    score, serial = inputs(empty=empty)
    found = exact_search(score, serial, top_k)
    assert torch.equal(found, exact_search_reference(score, serial, top_k))
    assert torch.equal((found < 0).sum(-1), torch.full(found.shape[:-1], max(0, top_k - (40 - empty))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_equal_the_reference(dtype):
    score, _ = inputs()
    serial = torch.arange(40).repeat(2, 1)
    serial[0, 4:8] = -1
    serial[1, 12:16] = serial[1, 12:16].flip(0)
    for top_k in (4, 12):
        found = exact_search(score.to(dtype), serial, top_k, 4)
        assert torch.equal(found, exact_search_reference(score.to(dtype), serial, top_k, 4))
        assert not torch.isin(found[0], torch.arange(4, 8)).any()
        assert not torch.isin(found[1], torch.arange(12, 16)).any()


def test_of_equal_scores_the_newer_comes_first():
    serial = torch.tensor([[3, 0, 2, 1]])
    assert exact_search(torch.zeros(1, 1, 1, 4), serial, 3).tolist() == [[[[0, 2, 3]]]]
    close = torch.tensor([0.0, 0.5 * TIE, 0.0, 2 * TIE]).view(1, 1, 1, 4)
    assert exact_search(close, serial, 2).tolist() == [[[[3, 0]]]]


def test_the_scores_are_not_changed():
    score, serial = inputs()
    before = score.clone()
    exact_search(score, serial, 4)
    assert torch.equal(before, score)


@pytest.mark.parametrize("chunk", [1, 4])
def test_search_traces(chunk):
    score, serial = inputs(empty=0)
    serial = torch.arange(40).repeat(2, 1)
    torch.compiler.reset()
    compiled = torch.compile(exact_search, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(score, serial, 8, chunk), exact_search(score, serial, 8, chunk))

    class Search(torch.nn.Module):
        def forward(self, score, serial):
            return exact_search(score, serial, 8, chunk)

    exported = torch.export.export(Search(), (score, serial)).module()
    assert torch.equal(exported(score, serial), exact_search(score, serial, 8, chunk))


def test_half_precision():
    score, serial = inputs()
    for dtype in (torch.bfloat16, torch.float16):
        found = exact_search(score.to(dtype), serial, 5)
        wanted = score.to(dtype).masked_fill((serial < 0)[:, None, None], -1).topk(5, -1).values
        assert (score.to(dtype).gather(-1, found) - wanted).abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("cached", [2**19, 100])
def test_nearest_equals_its_reference(chunk, cached, monkeypatch):
    """Also where queries are taken in several parts."""
    monkeypatch.setattr(sys.modules["memlib.ops.search"], "CACHED", cached)
    torch.manual_seed(0)
    query, keys = torch.randn(2, 3, 9, 5).double(), torch.randn(2, 3, 40, 5).double()
    serial = torch.arange(40).repeat(2, 1)
    serial[1, 20:] = -1
    for top_k in (4, 24):
        found = nearest(query, keys, serial, top_k, chunk)
        assert torch.equal(found, nearest_reference(query, keys, serial, top_k, chunk))
    empty = nearest(query[:, :, :0], keys, serial, 4, chunk)
    assert empty.shape == (2, 3, 0, 4)
