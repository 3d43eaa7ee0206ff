"""Products with selected rows, and the selection itself."""

from __future__ import annotations

import pytest
import torch

from memlib.ops import (
    selected_scores,
    selected_scores_reference,
    selected_sum,
    selected_sum_reference,
    top_index,
)

SIZES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 4, 3), (2, 2, 9, 200, 3, 5), (1, 2, 0, 6, 2, 3), (0, 2, 3, 6, 2, 3)]


def inputs(b, h, n, c, j, k, dtype=torch.float64, repeats=False):
    torch.manual_seed(c)
    index = torch.rand(b, h, n, c).topk(j, -1).indices
    if repeats:
        index = torch.randint(0, c, (b, h, n, j))
    return (
        torch.randn(b, h, n, k, dtype=dtype),
        torch.rand(b, h, n, j, dtype=dtype),
        torch.randn(b, h, c, k, dtype=dtype),
        index,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("repeats", [False, True])
def test_equals_its_reference(size, repeats, agrees):
    query, weight, table, index = inputs(*size, repeats=repeats)
    agrees(selected_scores, selected_scores_reference, [query, table, index])
    agrees(selected_sum, selected_sum_reference, [weight, table, index])


def test_views_of_larger_tensors(agrees):
    query, weight, table, index = inputs(*SIZES[2])
    wide = torch.randn(2, 2, 300, 10, dtype=torch.float64)
    agrees(
        lambda q, t: selected_scores(q, t[:, :, :200, ::2], index),
        lambda q, t: selected_scores_reference(q, t[:, :, :200, ::2], index),
        [query, wide],
    )
    agrees(
        lambda w, t: selected_sum(w, t[:, :, :200, ::2], index),
        lambda w, t: selected_sum_reference(w, t[:, :, :200, ::2], index),
        [weight, wide],
    )


def test_other_modes(near_in_half, traces):
    query, weight, table, index = inputs(*SIZES[2])
    for op, first in ((selected_scores, query), (selected_sum, weight)):
        near_in_half(op, [first, table, index], within=32)
        traces(op, [first.float(), table.float(), index])
    query, weight, table, index = inputs(*SIZES[1])
    for op, first in ((selected_scores, query), (selected_sum, weight)):
        torch.autograd.gradcheck(
            lambda a, t, op=op: op(a, t, index), [first.requires_grad_(), table.requires_grad_()]
        )


def test_gradients_are_the_same_in_every_run():
    query, _, table, index = inputs(4, 4, 64, 1000, 16, 8, dtype=torch.float32)

    def gradient():
        t = table.clone().requires_grad_()
        return torch.autograd.grad(selected_scores(query, t, index).square().sum(), t)[0]

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("c", "top_k"), [(1, 1), (7, 7), (7, 3), (500, 32), (500, 1), (2048, 32), (4096, 5)])
def test_top_index_has_the_scores_of_topk(dtype, c, top_k):
    torch.manual_seed(c)
    score = torch.randn(2, 3, 9, c).to(dtype)
    score[..., ::3] = -torch.inf
    index = top_index(score, top_k)
    assert torch.equal(score.gather(-1, index), score.topk(top_k, -1).values)
    assert all(len(row.unique()) == top_k for row in index.reshape(-1, top_k))
