"""Sparse products between queries and the rows that each query selected.

Axes: b batch, h heads, n queries, c rows of the table, j rows selected by a query, k width.

    score_nj = query_n . table_{index_nj}          a sampled dense-dense product
    y_n      = sum_j weight_nj table_{index_nj}    a sparse-dense product

With few rows selected, these replace the gathered tensor [b h n j k], which is the most expensive thing to
write, read and differentiate. The CPU path uses torch's embedding-bag kernels, which read rows in place. The
gradient of the table sorts the index, so that every row is summed in one fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.dispatch import apply, eager_cpu

COLUMNS_FROM, ROWS = 2048, 16  # longer rows are first reduced to the maxima of their columns
SORTED = 512  # shorter rows are sorted, which is faster than selecting first
DENSE_BELOW = 16  # with fewer rows than this times j, scattering weights and multiplying is faster


def selected_scores(query: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Inner products of each query with the rows it selected.

    query: [b h n k], table: [b h c k], index: [b h n j] in 0 … c - 1 -> [b h n j].
    """
    if eager_cpu(query, table, index) and index.numel():
        return apply(SelectedScores, query, table, index)
    return selected_scores_reference(query, table, index)


def selected_scores_reference(query: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """`selected_scores` by gathering the rows."""
    return einsum(query, gathered(table, index), "b h n k, b h n j k -> b h n j")


def selected_sum(weight: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Weighted sum of the rows that each query selected.

    weight: [b h n j], table: [b h c k], index: [b h n j] in 0 … c - 1 -> [b h n k].
    """
    if eager_cpu(weight, table, index) and index.numel():
        return apply(SelectedSum, weight, table, index)
    return selected_sum_reference(weight, table, index)


def selected_sum_reference(weight: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """`selected_sum` by gathering the rows."""
    return einsum(weight, gathered(table, index), "b h n j, b h n j k -> b h n k")


def gathered(table: Tensor, index: Tensor) -> Tensor:
    """The selected rows themselves: [b h c k], [b h n j] -> [b h n j k]."""
    rows = repeat(rearrange(index, "b h n j -> b h (n j)"), "b h i -> b h i k", k=table.shape[-1])
    return rearrange(table.gather(2, rows), "b h (n j) k -> b h n j k", j=index.shape[3])


class SelectedScores(torch.autograd.Function):
    """The CPU path of `selected_scores`."""

    @staticmethod
    def forward(query: Tensor, table: Tensor, index: Tensor) -> Tensor:
        return inner_products(query, table, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, table, index = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            weighted_rows(grad, table, index) if wanted[0] else None,
            scattered_rows(grad, query, index, table) if wanted[1] else None,
            None,
        )


class SelectedSum(torch.autograd.Function):
    """The CPU path of `selected_sum`."""

    @staticmethod
    def forward(weight: Tensor, table: Tensor, index: Tensor) -> Tensor:
        return weighted_rows(weight, table, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, table, index = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            inner_products(grad, table, index) if wanted[0] else None,
            scattered_rows(weight, grad, index, table) if wanted[1] else None,
            None,
        )


def heads_of(index: Tensor) -> Iterator[tuple[int, int]]:
    """Each row and head of the batch: in turn, a dense matrix of all rows stays in the cache."""
    return product(range(index.shape[0]), range(index.shape[1]))


def flat_index(index: Tensor, rows: int) -> Tensor:
    """The index into all tables one after another: [b h n j] -> [(b h n) j]."""
    b, h = index.shape[:2]
    first = rearrange(torch.arange(b * h) * rows, "(b h) -> b h 1 1", b=b)
    return rearrange(index + first, "b h n j -> (b h n) j")


def weighted_rows(weight: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """sum_j weight_nj table_{index_nj}: [b h n k]."""
    b, h, n, _ = index.shape
    bags = F.embedding_bag(
        flat_index(index, table.shape[2]),
        rearrange(table, "b h c k -> (b h c) k"),
        per_sample_weights=rearrange(weight.to(table.dtype), "b h n j -> (b h n) j"),
        mode="sum",
    )
    return rearrange(bags, "(b h n) k -> b h n k", b=b, h=h)


def inner_products(query: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """query_n . table_{index_nj}: [b h n j]."""
    b, h, n, j = index.shape
    if table.shape[2] <= DENSE_BELOW * j:
        score, found = query.new_empty(n, table.shape[2]), query.new_empty(b, h, n, j)
        for at in heads_of(index):
            torch.mm(query[at], table[at].T, out=score)
            torch.gather(score, -1, index[at], out=found[at])
        return found
    bags = b * h * n
    score = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rearrange(query, "b h n k -> (b h n) k").contiguous(),
        rearrange(table, "b h c k -> (b h c) k").contiguous(),
        rearrange(flat_index(index, table.shape[2]), "i j -> (i j)"),
        torch.arange(0, bags * j, j),
        torch.arange(bags).repeat_interleave(j),
        0,  # mode: sum
    )
    return rearrange(score, "(b h n j) -> b h n j", b=b, h=h, n=n)


def scattered_rows(weight: Tensor, query: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The transposed product: y_c = sum of weight_nj query_n over all (n, j) with index_nj = c: [b h c k]."""
    b, h, n, j = index.shape
    rows = like.shape[2]
    if rows <= DENSE_BELOW * j:
        dense, found = (
            weight.new_empty(n, rows),
            torch.empty_like(like, memory_format=torch.contiguous_format),
        )
        for at in heads_of(index):
            dense.zero_().scatter_add_(-1, index[at], weight[at])
            torch.mm(dense.T, query[at], out=found[at])
        return found
    flat = rearrange(flat_index(index, rows), "i j -> (i j)")
    total = flat.numel()
    order = (flat * total + torch.arange(total)).numpy()
    order.sort()  # numpy sorts integers with vector instructions; the order inside a row is by query
    by_row = torch.from_numpy(order) % total
    count = torch.bincount(flat, minlength=b * h * rows)
    summed = F.embedding_bag(
        by_row // j,
        rearrange(query, "b h n k -> (b h n) k"),
        offsets=count.cumsum(0) - count,
        per_sample_weights=rearrange(weight, "b h n j -> (b h n j)")[by_row],
        mode="sum",
    )
    return rearrange(summed, "(b h c) k -> b h c k", b=b, h=h)


def top_index(score: Tensor, top_k: int) -> Tensor:
    """Where each row's top_k largest entries are, largest first: [... c] -> [... top_k].

    Which of several equal entries is taken, and their order, is fixed but not specified.
    """
    if not eager_cpu(score):
        return score.topk(top_k, -1).indices
    score, c = score.detach(), score.shape[-1]
    if c >= COLUMNS_FROM and c % ROWS == 0 and c // ROWS >= 2 * top_k:
        columns = rearrange(score, "... (r c) -> ... r c", r=ROWS)
        best = top_index(columns.amax(-2), top_k)  # the top_k entries lie in the top_k best columns
        first = rearrange(torch.arange(0, c, c // ROWS), "r -> r 1")
        entry = rearrange(first + rearrange(best, "... j -> ... 1 j"), "... r j -> ... (r j)")
        return entry.gather(-1, top_index(score.gather(-1, entry), top_k))
    if score.dtype == torch.float64:
        array = score.numpy()
        if top_k == c:
            return torch.from_numpy(descending(array))
        chosen = np.argpartition(array, c - top_k, axis=-1)[..., c - top_k :]
        array = np.take_along_axis(array, chosen, -1)
        return torch.from_numpy(np.take_along_axis(chosen, descending(array), -1))
    largest = torch.finfo(torch.float32).max
    return top_of_finite(score.to(torch.float64).clamp_(-largest, largest), top_k)


def top_of_finite(wide: Tensor, top_k: int) -> Tensor:
    """`top_index` of float32 numbers in float64, all finite: [... c], which is overwritten -> [... top_k].

    Such a number has 29 bits free: with the index in them, numpy's vectorised selection and sorting of
    numbers need no second array.
    """
    c = wide.shape[-1]
    wide.view(torch.int64).bitwise_or_(torch.arange(c))
    array = wide.numpy()
    if top_k < c and c > SORTED:
        array.partition(c - top_k, axis=-1)
        array = array[..., c - top_k :]
    best = np.sort(array, axis=-1)[..., : -top_k - 1 : -1].copy()
    return torch.from_numpy(best).view(torch.int64).bitwise_and_(2**29 - 1)


def descending(array: np.ndarray) -> np.ndarray:
    """The order that sorts the last axis, largest first."""
    return np.argsort(array, axis=-1)[..., ::-1].copy()
