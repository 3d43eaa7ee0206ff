"""`gated_write` in Triton as one operator of torch, with gradients.

Axes: b batch, n tokens, s slots, e slot width. Nothing may be empty.
gated_write_kernel.py has the mathematics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("memlib_kernels::gated_write", mutates_args=())
def gated_write_op(slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """slots: [b s e], strength, erase: [b n s], values: [b n e] -> [b s e] of the slots' dtype."""
    from memlib_kernels.gated_write_kernel import forward

    return forward(slots, strength, erase, values)


@gated_write_op.register_fake
def _(slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    return slots.new_empty(slots.shape)


@torch.library.custom_op("memlib_kernels::gated_write_backward", mutates_args=())
def gated_write_backward_op(
    grad: Tensor, slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of slots, strength, erase and values."""
    from memlib_kernels.gated_write_kernel import backward

    return backward(grad, slots, strength, erase, values)


@gated_write_backward_op.register_fake
def _(
    grad: Tensor, slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dslots, dstrength, derase, dvalues = (t.new_empty(t.shape) for t in (slots, strength, erase, values))
    return dslots, dstrength, derase, dvalues


def save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward_of(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return gated_write_backward_op(grad, *ctx.saved_tensors)


gated_write_op.register_autograd(backward_of, setup_context=save_for_backward)
