"""Addresses and the read at them in Triton as operators of torch, with gradients.

Axes as in addressed.py; addressed_kernel.py has the mathematics. Nothing may be empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("memlib_kernels::addressed_weights", mutates_args=())
def addressed_weights_op(query: Tensor, table: Tensor, sharpness: Tensor) -> Tensor:
    """query: [b n h k], table: [h s k], of one dtype; sharpness: of one element -> [b n h s]."""
    from memlib_kernels.addressed_kernel import weights

    return weights(query, table, sharpness)


@addressed_weights_op.register_fake
def _(query: Tensor, table: Tensor, sharpness: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], table.shape[1])


@torch.library.custom_op("memlib_kernels::addressed_weights_backward", mutates_args=())
def addressed_weights_backward_op(
    grad: Tensor, query: Tensor, table: Tensor, sharpness: Tensor, address: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, table and sharpness."""
    from memlib_kernels.addressed_kernel import weights_backward

    return weights_backward(grad, query, table, sharpness, address)


@addressed_weights_backward_op.register_fake
def _(
    grad: Tensor, query: Tensor, table: Tensor, sharpness: Tensor, address: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dquery, dtable, dsharpness = (t.new_empty(t.shape) for t in (query, table, sharpness))
    return dquery, dtable, dsharpness


@torch.library.custom_op("memlib_kernels::addressed_read", mutates_args=())
def addressed_read_op(
    query: Tensor, table: Tensor, sharpness: Tensor, slots: Tensor, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is read, [b n e], and of each book's scores the maximum and the sum of exp(score - maximum).

    query: [b n h k], table: [h s k] of its dtype, sharpness: of one element, slots: [b h s e], share:
    [b n h], or None for 1 / h. Maximum and sum: [b n h], float32 at least.
    """
    from memlib_kernels.addressed_kernel import read

    return read(query, table, sharpness, slots, share)


@addressed_read_op.register_fake
def _(
    query: Tensor, table: Tensor, sharpness: Tensor, slots: Tensor, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (b, n, h, _), wide = query.shape, torch.promote_types(query.dtype, torch.float32)
    top, total = (query.new_empty(b, n, h, dtype=wide) for _ in range(2))
    return query.new_empty(b, n, slots.shape[-1]), top, total


@torch.library.custom_op("memlib_kernels::addressed_read_backward", mutates_args=())
def addressed_read_backward_op(
    grad: Tensor,
    query: Tensor,
    table: Tensor,
    sharpness: Tensor,
    slots: Tensor,
    share: Tensor | None,
    top: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, table, sharpness, slots and share (of the maximum's dtype, also for None)."""
    from memlib_kernels.addressed_kernel import read_backward

    return read_backward(grad, query, table, sharpness, slots, share, top, total)


@addressed_read_backward_op.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    table: Tensor,
    sharpness: Tensor,
    slots: Tensor,
    share: Tensor | None,
    top: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dquery, dtable, dsharpness, dslots, dshare = (
        t.new_empty(t.shape) for t in (query, table, sharpness, slots, top)
    )
    return dquery, dtable, dsharpness, dslots, dshare


def save_weights(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def backward_of_weights(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return addressed_weights_backward_op(grad, *ctx.saved_tensors)


def save_read(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def backward_of_read(ctx: Any, grad: Tensor, *unused: Tensor) -> Any:
    """Maximum and sum are there for this pass only: a gradient for them is not computed."""
    share = ctx.saved_tensors[4]
    *found, dshare = addressed_read_backward_op(grad, *ctx.saved_tensors)
    return *found, None if share is None else dshare.to(share.dtype)


addressed_weights_op.register_autograd(backward_of_weights, setup_context=save_weights)
addressed_read_op.register_autograd(backward_of_read, setup_context=save_read)
