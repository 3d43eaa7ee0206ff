"""Attention of tokens over the slots of a memory.

Axes: b batch, h heads, n queries, u groups of queries, s slots, j slots selected by a query or group, k key
width, e value width.

    score_ns = scale query_n . key_s + bias_ns,    w = softmax_s(score),    y_n = sum_s w_ns value_s

There is no causal mask: a memory contains the past only. A slot with bias -inf may not be read; a query that
may read no slot gets zero, and its lse is -inf. The bias may have a gradient: it is how a slot's learned log
importance enters. With top_k, each query reads the top_k slots with the highest scores only; with places,
the slots listed for it or for its group of queries, such as retrieved hits or chosen chapters.

On a GPU a Triton kernel reads the slots in place (attention_kernel.py); on a CPU the fastest of three paths
of torch runs: flash attention, two products with a softmax between, or products with selected rows.

Sources: Vaswani et al. 2017, arXiv 1706.03762; top-k: Gupta et al. 2021, arXiv 2106.06899.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.attention import (
    attention,
    attention_with_lse,
    autocast,
    logsumexp,
    softmax_or_zero,
    takes_kernel,
)
from memlib_kernels.attention_op import attention_op
from memlib_kernels.selected import gathered, selected_scores, selected_sum, top_index

FLASH_FROM = 2**21  # scores from which the flash kernel is faster: 8 MiB, more than a core's cache


def memory_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None = None,
    top_k: int | None = None,
    places: Tensor | None = None,
    scale: Tensor | float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What each query reads: [b h n e], and with return_lse the log-sum-exp of its scores [b h n].

    q: [b h n k], keys: [b h s k], values: [b h s e]; the head axis may be left out of all of them, and the
    batch axis out of keys and values that all rows share. bias: [b s], [b n s], or with heads four axes that
    broadcast to [b h n s]; scale: a number or a learned scalar tensor, 1 / sqrt(k) by default; top_k: None,
    or at least s, for all slots.

    places: integers [b u j], or with heads four axes that broadcast to [b h u j], -1 for none: the slots that
    the n / u queries of each group may read. A slot that is listed twice counts twice. Not together with
    top_k, nor with a bias that differs between queries.

    Differentiable in q, keys, values, bias and scale. lse is that of the slots read, float32 at least.
    Raises ValueError where the arguments do not go together.
    """
    heads = q.ndim == 4
    keys, values = (t if t.ndim == q.ndim else t.expand(len(q), *t.shape) for t in (keys, values))
    if not heads:
        q, keys, values = (rearrange(t, "b n k -> b 1 n k") for t in (q, keys, values))
    bias, slots = four_axes(bias), keys.shape[-2]
    if places is not None:
        places = checked_places(places, q, bias, top_k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    if top_k is not None and top_k < slots:
        y, lse = read_selected(q, keys, values, bias, selected(q, keys, bias, top_k), return_lse)
    elif not q.numel() or not slots:
        y, lse = q @ keys.transpose(-1, -2) @ values, q.new_full(q.shape[:-1], -torch.inf)
    elif takes_kernel(q, keys, values, bias):
        q, keys, values = autocast(q, keys, values)
        y, lse = attention_op(q, keys, values, bias, None, places, False, 0, 1.0)
    elif places is not None:
        y, lse = read_places(q, keys, values, bias, places)
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
    places: Tensor | None = None,
    scale: Tensor | float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`memory_attention` with explicit weights."""
    keys, values = (t if t.ndim == q.ndim else t.expand(len(q), *t.shape) for t in (keys, values))
    score = memory_scores(q, keys, bias, scale)
    if places is not None:
        score = score + log_listed(places, score)
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


def log_listed(places: Tensor, score: Tensor) -> Tensor:
    """The logarithm of how often each query's group lists each slot, -inf for never: score's shape."""
    places = places if places.ndim == score.ndim else rearrange(places, "b u j -> b 1 u j")
    shape = (*score.shape[:-2], *places.shape[-2:])
    slots = score.shape[-1]
    index = torch.where(places < 0, slots, places).long().expand(shape)
    counts = score.new_zeros(*shape[:-1], slots + 1).scatter_add(-1, index, score.new_ones(shape))
    return counts[..., :slots].log().repeat_interleave(score.shape[-2] // shape[-2], -2)


def checked_places(places: Tensor, q: Tensor, bias: Tensor | None, top_k: int | None) -> Tensor:
    """places with four axes. Raises ValueError where they do not go with the other arguments."""
    if top_k is not None or (bias is not None and not per_slot(bias)):
        raise ValueError("places: not together with top_k or with a bias that differs between queries")
    if places.is_floating_point() or places.ndim not in (3, 4) or q.shape[2] % max(1, places.shape[-2]):
        raise ValueError(
            f"places {places.dtype} {list(places.shape)}: must be integers [b u j] or [b h u j], whose u "
            f"groups divide {q.shape[2]} queries"
        )
    return places if places.ndim == 4 else rearrange(places, "b u j -> b 1 u j")


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


def selected(q: Tensor, keys: Tensor, bias: Tensor | None, top_k: int) -> Tensor:
    """The top_k slots of each query: [b h n j]. All scores are computed once, without a gradient."""
    with torch.no_grad():
        score = q @ keys.mT
        return top_index(score if bias is None else score + bias.to(score.dtype), top_k)


def read_selected(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """By the slots that each query selected, index: [b h n j]."""
    if takes_kernel(q, keys, values, bias) and (bias is None or per_slot(bias)):
        return cast(tuple[Tensor, Tensor], attention_op(q, keys, values, bias, None, index, False, 0, 1.0))
    best = selected_scores(q, keys, index)
    if bias is not None:
        b, h, n, top_k = index.shape
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


def read_places(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, places: Tensor
) -> tuple[Tensor, Tensor]:
    """By the slots listed for each group of queries, which are gathered once for a group."""
    (b, h, *_), (u, j) = q.shape, places.shape[-2:]
    index = places.expand(b, h, u, j).clamp(min=0).long()
    shut = torch.where(places < 0, -torch.inf, 0.0).to(q.dtype).expand(b, h, u, j)
    if bias is not None:
        slots = bias.expand(b, h, 1, bias.shape[-1])
        shut = shut + slots.expand(b, h, u, -1).gather(-1, index).to(q.dtype)
    k, v = (rearrange(gathered(t, index), "b h u j k -> b (h u) j k") for t in (keys, values))
    grouped = rearrange(q, "b h (u n) k -> b (h u) n k", u=u)
    y, lse = read_dense(grouped, k, v, rearrange(shut, "b h u j -> b (h u) 1 j"), True)
    assert lse is not None
    return rearrange(y, "b (h u) n e -> b h (u n) e", u=u), rearrange(lse, "b (h u) n -> b h (u n)", u=u)
