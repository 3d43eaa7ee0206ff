"""Softmax attention, with the log-sum-exp of its scores, and the exact merge of two attentions.

Axes: b batch, h heads, n queries, m keys, k head width.

    s_nm = scale q_n . k_m (+ bias_nm),   scale = 1 / sqrt(k) by default
    out_n = sum_m softmax_m(s_nm) v_m,    lse_n = log sum_m exp(s_nm)

Two attentions over separate sets of keys, each with its lse, merge into one softmax over both sets:

    out = (1 - w) out_a + w out_b,        w = sigma(lse_b - lse_a)

On a GPU a Triton kernel computes it (attention_kernel.py), on a CPU torch's flash kernel; in float64 outside
the interpreter, and under torch.compile on a CPU, plain torch. There a sliding window of less than half the
queries is computed in blocks.
Sources: Vaswani et al. 2017, arXiv 1706.03762; Dao et al. 2022, arXiv 2205.14135 (lse and its backward pass).
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.attention_op import attention_op
from memlib_kernels.launch import runs_triton
from memlib_kernels.merge_op import merge_op
from memlib_kernels.rows import heads_last
from memlib_kernels.tiles import has_tiles

BAND = 64  # the least queries of a block of `banded`


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the log-sum-exp of its scores, without the [n m] matrix of weights.

    q: [b h n k]; k: [b g m k], v: [b g m e], where h / g query heads share a key head (grouped queries).
    causal: query i attends to keys 0 … i + m - n, so that the last query sees the last key; window: only to
    the newest `window` of them (or of all keys up to i + m - n, without causal); valid: [b m], false for keys
    that nobody may attend to, such as padding; scale: 1 / sqrt(k) by default.

    Returns out [b h n e] and lse [b h n], both differentiable; out is 0 and lse -inf where a query may attend
    to nothing. Raises ValueError where shapes do not fit.
    """
    check_heads(q, k, v, window, valid)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if takes_kernel(q, k, v):
        q, k, v = autocast(q, k, v)
        valid = None if valid is None else valid.to(torch.uint8)
        out, lse = attention_op(q, k, v, None, valid, None, causal, window or 0, scale)
        return out, lse
    k, v = of_query_heads(q, k, v)
    if causal and valid is None and window is not None and 2 * window < q.shape[-2] <= k.shape[-2]:
        return banded(q, k, v, window, scale)
    plain = causal and q.shape[-2] == k.shape[-2] and window is None and valid is None
    mask = None if plain else allowed_keys(q, k, causal, window, valid)
    return unfused(q)(q, k, v, mask, causal=plain, scale=scale)


def unfused(q: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention without Triton: in float64 plain torch, else torch's own kernel."""
    return attention_with_lse_reference if q.dtype == torch.float64 else attention_with_lse


def banded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention to the newest `window` keys, in c blocks of r queries; each reads its 2 r keys.

    Of the n m scores 2 n r are computed, r >= window. q, k, v: [b h n k], [b h m k], [b h m e],
    n <= m.
    """
    b, n, m = len(q), q.shape[-2], k.shape[-2]
    r = min(n, max(BAND, window))
    more, first = -n % r, m - n - r  # queries to fill the last block; the first key that is read

    def blocks(keys: Tensor) -> Tensor:
        part = F.pad(keys[..., max(first, 0) :, :], (0, 0, max(-first, 0), more))
        part = rearrange(part, "b h (c r) k -> (b h) c r k", r=r)
        return torch.cat((part[:, :-1], part[:, 1:]), -2)

    query, key = (torch.arange(size, device=q.device) for size in (r, 2 * r))
    behind = rearrange(query + r, "r -> r 1") - key
    block = rearrange(torch.arange((n + more) // r, device=q.device), "c -> c 1 1")
    allowed = (behind >= 0) & (behind < window) & (block * r + first + key >= 0)
    own = rearrange(F.pad(q, (0, 0, 0, more)), "b h (c r) k -> (b h) c r k", r=r)
    out, lse = unfused(q)(own, blocks(k), blocks(v), allowed[None], scale=scale)
    out = rearrange(out, "(b h) c r e -> b h (c r) e", b=b)[..., :n, :]
    return out, rearrange(lse, "(b h) c r -> b h (c r)", b=b)[..., :n]


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attention` with explicit scores."""
    check_heads(q, k, v, window, valid)
    k, v = of_query_heads(q, k, v)
    mask = allowed_keys(q, k, causal, window, valid)
    return attention_with_lse_reference(q, k, v, mask, scale=scale)


def of_query_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each query head."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def allowed_keys(
    q: Tensor, k: Tensor, causal: bool, window: int | None, valid: Tensor | None
) -> Tensor | None:
    """Which keys each query may attend to, [n m] or [b 1 n m]; None for all."""
    n, m = q.shape[-2], k.shape[-2]
    if not causal and window is None and valid is None:
        return None
    key = torch.arange(m, device=q.device)
    last = rearrange(torch.arange(m - n, m, device=q.device), "n -> n 1")
    allowed = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed & (key <= last)
    if window is not None:
        allowed = allowed & (key > last - window)
    return allowed if valid is None else allowed & rearrange(valid.bool(), "b m -> b 1 1 m")


def check_heads(q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None) -> None:
    """Raise ValueError where the arguments of `flash_attention` do not fit."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4 and len(q) == len(k) == len(v) and k.shape[1:3] == v.shape[1:3]):
        raise ValueError(f"{shapes}: must be [b h n k], [b g m k] and [b g m e] of one batch size")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}: queries and keys must have one width")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: {k.shape[1]} key heads must divide {q.shape[1]} query heads")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: at least 1 (a query sees itself), or None for all keys")
    if valid is not None and valid.shape != (len(k), k.shape[2]):
        raise ValueError(f"valid {list(valid.shape)}: must be [b m], here {[len(k), k.shape[2]]}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v.

    q: [b h n k], k: [b h m k], v: [b h m e]; mask: true = may attend, or a bias added to the scores,
    broadcastable to [b h n m]; causal: query i attends to keys 0 … i. Returns [b h n e], zero for a query
    that may attend to nothing. Raises ValueError if both mask and causal are given.
    """
    check_mask(mask, causal)
    if takes_kernel(q, k, v, mask) and q.numel():
        return by_triton(q, k, v, mask, causal, scale)[0]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`attention` with explicit scores."""
    return attention_with_lse_reference(q, k, v, mask, causal=causal, scale=scale)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` and the log-sum-exp of its scores, both differentiable.

    Arguments as for `attention`, whose result `out` equals bit for bit. lse: [b h n], natural logarithm,
    float32 at least, -inf for a query that may attend to nothing.
    """
    check_mask(mask, causal)
    if takes_kernel(q, k, v, mask) and q.numel():
        return by_triton(q, k, v, mask, causal, scale)
    q, k, v = autocast(q, k, v)
    learned = mask is not None and mask.is_floating_point() and mask.requires_grad
    empty = not (q.shape[-2] and k.shape[-2] and q.shape[0] and q.shape[1])
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and not learned and not empty:
        return flash(q, k, v, as_bias(mask, q), causal, 1 / sqrt(q.shape[-1]) if scale is None else scale)
    lse = logsumexp(scores(q, k, mask, causal, scale))
    return attention(q, k, v, mask, causal=causal, scale=scale), lse


def attention_with_lse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` with explicit scores."""
    check_mask(mask, causal)
    score = scores(q, k, mask, causal, scale)
    weight = softmax_or_zero(score)
    return einsum(weight, v.to(weight.dtype), "b h n m, b h m e -> b h n e").to(v.dtype), logsumexp(score)


def takes_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> bool:
    """Whether a Triton kernel computes it: `runs_triton`, and the sizes and dtype have tiles."""
    if not runs_triton(q, k, v, mask):
        return False
    dtype = autocast(q.new_empty(0))[0].dtype
    return has_tiles("attention", dtype, q.shape[-1], v.shape[-1], rows=mask_rows(mask))


def mask_rows(mask: Tensor | None) -> tuple[int, ...]:
    """The length of a mask's rows, if it has one for each query: what `has_tiles` asks for."""
    return () if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else (mask.shape[-1],)


def by_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` by the kernel, whose causal mask ends at the last key, not at the first."""
    q, k, v = autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if causal and q.shape[-2] != k.shape[-2]:
        shape = q.shape[-2], k.shape[-2]
        mask, causal = torch.ones(shape, dtype=torch.bool, device=q.device).tril(), False
    bias = as_bias(mask, q)
    bias = None if bias is None else bias[(None,) * (4 - bias.ndim)]
    if bias is not None and bias.shape[-1] != k.shape[-2]:
        bias = bias.expand(*bias.shape[:-1], k.shape[-2])
    out, lse = attention_op(q, k, v, bias, None, None, causal, 0, scale)
    return out, lse


def scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """The softmax's arguments in float32 at least, -inf where a query may not attend: [b h n m]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = scale * einsum(q.to(wide), k.to(wide), "b h n k, b h m k -> b h n m")
    if causal:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return score
    return score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask


def softmax_or_zero(score: Tensor) -> Tensor:
    """softmax over the last axis; zeros where every score is -inf."""
    dead = score.isneginf().all(-1, keepdim=True)
    return torch.softmax(score.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


def logsumexp(score: Tensor) -> Tensor:
    """Over the last axis; -inf, with a gradient of zero, where every score is -inf."""
    dead = score.isneginf().all(-1, keepdim=True)
    return score.masked_fill(dead, 0.0).logsumexp(-1).masked_fill(dead[..., 0], -torch.inf)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, logit: Tensor | float = 0.0) -> Tensor:
    """One softmax over the keys of a and b, from an attention over each; logit is added to b's scores.

    out_a, out_b: [b h n k]; lse_a, lse_b: [b h n]; logit: a number or broadcastable to [b h n] -> [b h n k].
    Where b is shut (lse_b or logit is -inf) the result is out_a, bit for bit.
    """
    if runs_triton(out_a, lse_a, out_b, lse_b) and has_tiles("merge", out_a.dtype, out_a.shape[-1]):
        return merge_op(out_a, lse_a, out_b, (lse_b + logit).expand_as(lse_a))
    weight = merge_weight(lse_a, lse_b, logit)
    return torch.lerp(out_a, out_b, rearrange(weight, "b h n -> b h n 1").to(out_a.dtype))


def merge_weight(lse_a: Tensor, lse_b: Tensor, logit: Tensor | float = 0.0) -> Tensor:
    """Share of b in `merge`, sigma(lse_b + logit - lse_a), 0 where b is shut: [b h n]."""
    shifted = lse_b + logit
    return torch.sigmoid(torch.where(shifted.isneginf(), -torch.inf, shifted - lse_a))


def merge_reference(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, logit: Tensor | float = 0.0
) -> Tensor:
    """`merge` as a sum of two weighted outputs."""
    lse = torch.stack(torch.broadcast_tensors(lse_a, lse_b + logit))
    top = lse.amax(0)
    raised = torch.exp(lse - torch.where(top.isneginf(), 0.0, top))
    weight = raised / raised.sum(0).clamp(min=torch.finfo(lse.dtype).tiny)
    share_a, share_b = rearrange(weight, "two b h n -> two b h n 1")
    return (share_a * out_a + share_b * out_b).to(out_a.dtype)


def check_mask(mask: Tensor | None, causal: bool) -> None:
    if mask is not None and causal:
        raise ValueError("mask and causal = True: give one; a causal mask can be combined by `&` beforehand")


def as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as something to add to scores, as F.scaled_dot_product_attention makes it."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -torch.inf)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """Tensors in autocast's precision where that is on, as F.scaled_dot_product_attention takes them."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    return [t.to(tensors[0].dtype) for t in tensors]


@torch.library.custom_op("memlib::flash", mutates_args=(), device_types="cpu")
def flash(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """torch's flash attention for the CPU and its lse. bias: without a gradient."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=full(bias), scale=scale
    )
    lse = lse.contiguous()
    return out, lse if bias is None else lse.masked_fill_(nothing(bias), -torch.inf)


@flash.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.custom_op("memlib::flash_backward", mutates_args=(), device_types="cpu")
def flash_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for both outputs of `flash`.

    With p = softmax(s), the score's gradient is ds = p (dout . v - dout . out + dlse). torch's kernel takes
    no dlse, but it uses `out` only for dout . out. So it is given another out' with

        dout . out' = dout . out - dlse,    out' = out - sign(dout) dlse / |dout|_1

    Where dout is nearly zero, its first entry is moved by an amount below the rounding of dlse.
    grad_lse: None if lse is not used.
    """
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)  # out' needs more digits than half precision has
    grad_out, q, k, v, out = (t.to(wide) for t in (grad_out, q, k, v, out))
    dead = lse.isneginf()
    lse = lse.masked_fill(dead, 0.0)
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(dead, 0.0)
        least = torch.finfo(wide).eps * 2.0**-20 * grad_lse.abs()
        length = torch.linalg.vector_norm(grad_out, 1, dim=-1)
        if bool((length < least).any()):
            grad_out = grad_out.clone()
            grad_out[..., 0] += torch.copysign(least, grad_out[..., 0])
            length = torch.linalg.vector_norm(grad_out, 1, dim=-1)
        share = (grad_lse / length).nan_to_num_(0.0, 0.0, 0.0)
        out = torch.addcmul(out, torch.sign(grad_out), rearrange(share, "b h n -> b h n 1"), value=-1)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=full(bias, wide), scale=scale
    )
    return tuple(grad.to(dtype) for grad in found)


@flash_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (heads_last(t, t.shape[-1]) for t in (q, k, v))
    return dq, dk, dv


def full(bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A bias with the two or four axes that torch's kernel takes."""
    if bias is None:
        return None
    return (bias if bias.ndim in (2, 4) else bias[(None,) * (4 - bias.ndim)]).to(dtype or bias.dtype)


def nothing(bias: Tensor) -> Tensor:
    """Queries that may attend to nothing, broadcastable to [b h n]."""
    return bias.isneginf().all(-1)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)  # None for an lse that is not used


def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, bias, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    found = flash_backward(grad_out, grad_lse, q, k, v, out, lse, bias, ctx.causal, ctx.scale)
    return *found, None, None, None


flash.register_autograd(backward, setup_context=save_for_backward)
