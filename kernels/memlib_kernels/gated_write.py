"""Writing a segment of tokens into slots, without a loop over tokens.

Axes: b batch, n tokens, s slots, e slot width, h banks.

`gated_write`: token after token, each erases a part of every slot and adds a part of its value:

    M_s <- (1 - erase_ts) M_s + strength_ts value_t        for t = 1 … n

After the last token, what token t wrote has been multiplied by every later (1 - erase):

    M_s' = prod_u (1 - erase_us) M_s + sum_t strength_ts later_ts value_t
    later_ts = prod_{u>t} (1 - erase_us)

`decaying_write`: the same with one decay per token and bank instead of an erasure per token and slot.

The state's dtype, at least float32 inside, decides: inputs are cast to it, and the result has it.
Sources: the gates, Kang et al. 2025, arXiv 2502.06049; the product form, Yang et al. 2023, arXiv 2312.06635.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.dispatch import apply, eager_cpu
from memlib_kernels.gated_write_op import gated_write_op
from memlib_kernels.launch import runs_triton
from memlib_kernels.tiles import has_tiles


def gated_write(slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """The slots after all tokens have written.

    slots: [b s e], strength, erase: [b n s], values: [b n e] -> [b s e]. erase must lie in 0 … 1; at 1 the
    earlier content of a slot is erased completely. It costs less if strength and erase are one tensor.
    """
    dtype = torch.promote_types(slots.dtype, torch.float32)
    rows = tuple(slots.shape[1:])
    takes = runs_triton(slots, strength, erase, values) and has_tiles("gated_write", dtype, rows=rows)
    if takes and slots.numel() and values.numel():
        return gated_write_op(slots, strength, erase, values)
    same = erase is strength
    wide = [t.to(dtype) for t in (slots, strength, erase, values)]
    if eager_cpu(*wide) and all(t.numel() for t in wide):
        slots_, strength_, erase_, values_ = wide
        return apply(GatedWrite, slots_, strength_, None if same else erase_, values_)[0].to(slots.dtype)
    return gated_write_traced(*wide).to(slots.dtype)


def gated_write_reference(slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """`gated_write` token after token."""
    dtype = torch.promote_types(slots.dtype, torch.float32)
    written = slots.to(dtype)
    for t in range(values.shape[1]):
        keep = rearrange(1 - erase[:, t].to(dtype), "b s -> b s 1")
        new = einsum(strength[:, t].to(dtype), values[:, t].to(dtype), "b s, b e -> b s e")
        written = keep * written + new
    return written.to(slots.dtype)


def gated_write_traced(slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """`gated_write` by logarithms, a form that compilers fuse. Erasures stop just below 1."""
    remain = torch.log1p(-erase.clamp(max=1 - torch.finfo(erase.dtype).eps))
    total = reduce(remain, "b n s -> b 1 s", "sum")
    later = torch.exp(total - torch.cumsum(remain, 1))
    kept = slots * rearrange(torch.exp(total), "b 1 s -> b s 1")
    return kept + einsum(strength * later, values, "b n s, b n e -> b s e")


def decaying_write(
    slots: Tensor, address: Tensor, strength: Tensor, log_decay: Tensor, values: Tensor
) -> Tensor:
    """Banks that accumulate and decay, after all tokens have written.

        M_h' = exp(sum_u log_decay_uh) M_h + sum_t exp(sum_{u>t} log_decay_uh) strength_th address_ths value_t

    slots: [b h s e], address: [b n h s], strength, log_decay: [b n h], values: [b n e] -> [b h s e]. Plain
    torch on every device: products over tokens are small here, [b n h], and one matrix product does the rest.
    """
    dtype = torch.promote_types(slots.dtype, torch.float32)
    address, strength, log_decay, values = (t.to(dtype) for t in (address, strength, log_decay, values))
    total = reduce(log_decay, "b n h -> b 1 h", "sum")
    # Summed from the end: total - cumsum would lose all digits where decay is fast.
    after = F.pad(log_decay[:, 1:], (0, 0, 0, 1))
    later = torch.flip(torch.cumsum(torch.flip(after, [1]), 1), [1])
    coefficient = strength * torch.exp(later)
    weight = address * rearrange(coefficient, "b n h -> b n h 1")
    kept = slots.to(dtype) * rearrange(torch.exp(total), "b 1 h -> b h 1 1")
    new = rearrange(weight, "b n h s -> b (h s) n") @ values
    return torch.add(kept, rearrange(new, "b (h s) e -> b h s e", h=slots.shape[1])).to(slots.dtype)


def decaying_write_reference(
    slots: Tensor, address: Tensor, strength: Tensor, log_decay: Tensor, values: Tensor
) -> Tensor:
    """`decaying_write` token after token."""
    dtype = torch.promote_types(slots.dtype, torch.float32)
    written = slots.to(dtype)
    for t in range(values.shape[1]):
        keep = rearrange(torch.exp(log_decay[:, t].to(dtype)), "b h -> b h 1 1")
        share = rearrange(strength[:, t].to(dtype), "b h -> b h 1") * address[:, t].to(dtype)
        written = keep * written + einsum(share, values[:, t].to(dtype), "b h s, b e -> b h s e")
    return written.to(slots.dtype)


class GatedWrite(torch.autograd.Function):
    """`gated_write` by products instead of logarithms, with fewer temporaries. erase: None if it is strength.

    Outputs: the slots, and what the backward pass needs, later and prod_u (1 - erase_u).
    """

    @staticmethod
    def forward(
        slots: Tensor, strength: Tensor, erase: Tensor | None, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        later, total = later_products(remaining(strength if erase is None else erase))
        weight = rearrange(later * strength, "b n s -> b s n")
        kept = slots * rearrange(total, "b s -> b s 1")
        return torch.baddbmm(kept, weight, values), later, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> Any:
        """With i_t = later_t (grad . value_t), the gradient of strength_t, that of 1 - erase_u is

        (sum_{t<u} strength_t i_t + prod_t (1 - erase_t) grad . M) / (1 - erase_u)
        """
        slots, strength, erase, values, later, total = ctx.saved_tensors
        shares_erase = erase is None
        remain = remaining(strength if shares_erase else erase)
        grad_values = torch.bmm(later * strength, grad)
        grad_strength = torch.bmm(values, rearrange(grad, "b s e -> b e s")).mul_(later)
        first = (grad * slots).sum(-1).mul_(total)
        grad_remain = sums_before(grad_strength * strength, first).div_(remain)
        grad_slots = grad * rearrange(total, "b s -> b s 1")
        if shares_erase:
            return grad_slots, grad_strength.sub_(grad_remain), None, grad_values
        return grad_slots, grad_strength, grad_remain.neg_(), grad_values


def remaining(erase: Tensor) -> Tensor:
    """1 - erase. Where nothing remains it is a number too small to see, so that it can be divided by."""
    return (1 - erase).clamp_(min=torch.finfo(erase.dtype).tiny ** 0.5)


def later_products(remain: Tensor) -> tuple[Tensor, Tensor]:
    """prod_{u>t} remain_u for each t: [b n s], and prod_u remain_u: [b s].

    In blocks of about sqrt(n) tokens: the products inside all blocks at once, then from block to block.
    """
    n = remain.shape[1]
    blocks = in_blocks(remain, 1.0)
    later = torch.empty_like(blocks)
    later[:, :, -1] = 1.0
    for i in range(blocks.shape[2] - 2, -1, -1):
        torch.mul(blocks[:, :, i + 1], later[:, :, i + 1], out=later[:, :, i])
    whole = blocks[:, :, 0] * later[:, :, 0]
    beyond = torch.ones_like(whole)
    for i in range(whole.shape[1] - 2, -1, -1):
        torch.mul(whole[:, i + 1], beyond[:, i + 1], out=beyond[:, i])
    later.mul_(rearrange(beyond, "b m s -> b m 1 s"))
    return rearrange(later, "b m c s -> b (m c) s")[:, :n], whole[:, 0] * beyond[:, 0]


def in_blocks(tensor: Tensor, fill: float) -> Tensor:
    """n tokens in blocks of about sqrt(n), the last one filled up: [b n s] -> [b m c s]."""
    n = tensor.shape[1]
    block = isqrt(n - 1) + 1
    if n % block:
        tensor = F.pad(tensor, (0, 0, 0, -n % block), value=fill)
    return rearrange(tensor, "b (m c) s -> b m c s", c=block)


def sums_before(added: Tensor, first: Tensor) -> Tensor:
    """first + sum_{t<u} added_t for each u; first: [b s], added: [b n s] -> [b n s]. By blocks as above."""
    n = added.shape[1]
    blocks = in_blocks(added, 0.0)
    sums = torch.empty_like(blocks)
    sums[:, :, 0] = 0.0
    for i in range(blocks.shape[2] - 1):
        torch.add(sums[:, :, i], blocks[:, :, i], out=sums[:, :, i + 1])
    whole = sums[:, :, -1] + blocks[:, :, -1]
    begins = torch.empty_like(whole)
    begins[:, 0] = first
    for i in range(whole.shape[1] - 1):
        torch.add(begins[:, i], whole[:, i], out=begins[:, i + 1])
    sums.add_(rearrange(begins, "b m s -> b m 1 s"))
    return rearrange(sums, "b m c s -> b (m c) s")[:, :n]
