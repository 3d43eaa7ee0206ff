"""Attention of tokens over the slots of a memory.

Axes: b batch, h heads, n queries, s slots, j slots selected by a query, k key width, e value width.

    score_ns = scale query_n . key_s + bias_ns,    w = softmax_s(score),    y_n = sum_s w_ns value_s

There is no causal mask: a memory contains the past only. A slot with bias -inf may not be read; a query that
may read no slot gets zero, and its lse is -inf. The bias may have a gradient: it is how a slot's learned log
importance enters. With top_k, each query reads the top_k slots with the highest scores only.

Sources: Vaswani et al. 2017, arXiv 1706.03762; top-k: Gupta et al. 2021, arXiv 2106.06899.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.attention import attention, attention_with_lse, logsumexp, softmax_or_zero
from memlib_kernels.selected import selected_scores, selected_sum, top_index

FLASH_FROM = 2**21  # scores from which the flash kernel is faster: 8 MiB, more than a core's cache


def memory_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None = None,
    top_k: int | None = None,
    scale: Tensor | float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What each query reads: [b h n e], and with return_lse the log-sum-exp of its scores [b h n].

    q: [b h n k], keys: [b h s k], values: [b h s e]; the head axis may be left out of all of them.
    bias: [b s], [b n s], or with heads four axes that broadcast to [b h n s]; scale: a number or a learned
    scalar tensor, 1 / sqrt(k) by default; top_k: None, or at least s, for all slots.
    Differentiable in all tensors. lse is that of the slots read, float32 at least.
    """
    heads = q.ndim == 4
    if not heads:
        q, keys, values = (rearrange(t, "b n k -> b 1 n k") for t in (q, keys, values))
    bias = four_axes(bias)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    slots, width = keys.shape[-2:]
    if top_k is not None and top_k < slots:
        y, lse = read_selected(q, keys, values, bias, top_k, return_lse)
    elif not q.numel() or not slots:
        y, lse = q @ keys.transpose(-1, -2) @ values, q.new_full(q.shape[:-1], -torch.inf)
    elif flash_is_faster(q, keys, values, bias):
        y, lse = read_flash(q, keys, values, bias, return_lse)
    else:
        y, lse = read_dense(q, keys, values, bias, return_lse)
    if not heads:
        y = rearrange(y, "b 1 n e -> b n e")
        lse = None if lse is None else rearrange(lse, "b 1 n -> b n")
    return (y, lse) if lse is not None and return_lse else y


def memory_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None = None,
    top_k: int | None = None,
    scale: Tensor | float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`memory_attention` with explicit weights."""
    score = memory_scores(q, keys, bias, scale)
    if top_k is not None and top_k < keys.shape[-2]:
        lowest = score.detach().topk(top_k, -1).indices
        score = torch.full_like(score, -torch.inf).scatter(-1, lowest, score.gather(-1, lowest))
    y = einsum(softmax_or_zero(score), values.to(score.dtype), "... n s, ... s e -> ... n e").to(values.dtype)
    return (y, logsumexp(score)) if return_lse else y


def memory_attention_weights(
    q: Tensor,
    keys: Tensor,
    *,
    bias: Tensor | None = None,
    top_k: int | None = None,
    scale: Tensor | float | None = None,
) -> Tensor:
    """The weights with which `memory_attention` reads, for recording: [b h n s], zero where it does not."""
    score = memory_scores(q, keys, bias, scale)
    if top_k is None or top_k >= keys.shape[-2]:
        return softmax_or_zero(score).to(q.dtype)
    index = top_index(score, top_k)
    weight = softmax_or_zero(score.gather(-1, index))
    return torch.zeros_like(score).scatter(-1, index, weight).to(q.dtype)


def memory_scores(q: Tensor, keys: Tensor, bias: Tensor | None, scale: Tensor | float | None) -> Tensor:
    """The softmax's arguments, float32 at least: [b h n s] or [b n s]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = scale * einsum(q.to(wide), keys.to(wide), "... n k, ... s k -> ... n s")
    if bias is None:
        return score
    if bias.ndim == 2:
        bias = rearrange(bias, "b s -> b 1 s")
    return score + (rearrange(bias, "b n s -> b 1 n s") if score.ndim > bias.ndim else bias)


def four_axes(bias: Tensor | None) -> Tensor | None:
    """A bias that broadcasts to [b h n s]."""
    if bias is None or bias.ndim == 4:
        return bias
    return rearrange(bias, "b s -> b 1 1 s" if bias.ndim == 2 else "b n s -> b 1 n s")


def per_slot(bias: Tensor) -> bool:
    """Whether a bias is the same for all queries."""
    return bias.shape[-2] == 1


def flash_is_faster(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """By shapes only, as measured. A bias costs eight columns, unequal widths are filled up with zeros."""
    if bias is not None and not per_slot(bias) and bias.requires_grad:
        return False  # torch's kernel gives no gradient to a bias
    if torch.compiler.is_compiling():
        return True  # a compiled or exported graph must not depend on the batch size
    worth = FLASH_FROM
    if bias is not None:
        worth *= 2
    if keys.shape[-1] != values.shape[-1]:
        worth *= 4
    return q.shape[:-1].numel() * keys.shape[-2] >= worth


def read_flash(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """By the flash kernel. A bias per slot is one more feature of its key, which keeps its gradient:

    [q, 1] . [key, bias] = q . key + bias
    """
    width, mask, dead = values.shape[-1], None, None
    if bias is not None:
        shut = bias.isneginf()
        dead = shut.all(-1)
        if per_slot(bias):
            b, h, s, _ = keys.shape
            finite = bias.masked_fill(shut, torch.finfo(keys.dtype).min / 2).to(keys.dtype)
            finite = rearrange(finite.expand(b, h, 1, s), "b h 1 s -> b h s 1")
            q, keys = torch.cat((q, torch.ones_like(q[..., :1])), -1), torch.cat((keys, finite), -1)
        else:
            mask = bias.to(q.dtype)
    if bias is not None or keys.shape[-1] != width:
        wide = -(-max(keys.shape[-1], width) // 8) * 8
        q, keys, values = (F.pad(t, (0, wide - t.shape[-1])) for t in (q, keys, values))
    if return_lse:
        y, lse = attention_with_lse(q, keys, values, mask, scale=1.0)
        lse = lse if dead is None else lse.masked_fill(dead, -torch.inf)
    else:
        y, lse = attention(q, keys, values, mask, scale=1.0), None
    y = y[..., :width]
    return (y if dead is None else y.masked_fill(rearrange(dead, "b h n -> b h n 1"), 0.0)), lse


def read_dense(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """By a softmax between two products."""
    score = q @ keys.transpose(-1, -2)
    dead = None
    if bias is not None:
        dead = bias.isneginf().all(-1, keepdim=True)
        score = score + bias.masked_fill(dead, 0.0).to(score.dtype)
    y = torch.softmax(score, -1) @ values
    lse = score.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1) if return_lse else None
    if dead is None:
        return y, lse
    return y.masked_fill(dead, 0.0), lse if lse is None else lse.masked_fill(dead[..., 0], -torch.inf)


def read_selected(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, top_k: int, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """By the top_k slots of each query. All scores are computed once, without a gradient, to select."""
    with torch.no_grad():
        score = q @ keys.transpose(-1, -2)
        index = top_index(score if bias is None else score + bias.to(score.dtype), top_k)
    best = selected_scores(q, keys, index)
    if bias is not None:
        b, h, n, _ = index.shape
        if per_slot(bias):
            flat = bias.expand(b, h, 1, bias.shape[-1])[:, :, 0].gather(
                -1, rearrange(index, "b h n j -> b h (n j)")
            )
            chosen = rearrange(flat, "b h (n j) -> b h n j", n=n, j=top_k)
        else:
            chosen = bias.expand(b, h, n, bias.shape[-1]).gather(-1, index)
        best = best + chosen.to(best.dtype)
    best = best.to(torch.promote_types(best.dtype, torch.float32))
    weight = best.softmax(-1) if bias is None else softmax_or_zero(best)
    return selected_sum(weight.to(values.dtype), values, index), logsumexp(best) if return_lse else None
