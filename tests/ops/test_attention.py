"""Attention with its log-sum-exp, and the merge of two attentions."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from memlib.ops import (
    attention,
    attention_reference,
    attention_with_lse,
    attention_with_lse_reference,
    flash_attention,
    flash_attention_reference,
    merge,
    merge_reference,
)

SHAPES = [(1, 1, 1, 1, 2), (2, 3, 5, 7, 4), (1, 2, 64, 64, 8), (2, 1, 33, 65, 16), (1, 2, 3, 700, 8)]


def inputs(b, h, n, m, k, dtype=torch.float64):
    torch.manual_seed(n + m)
    return [torch.randn(b, h, x, k, dtype=dtype) for x in (n, m, m)]


def masks(b, h, n, m):
    torch.manual_seed(n)
    some = torch.rand(b, 1, n, m) > 0.4
    some[:, :, 0] = False
    return {
        "none": None,
        "rows": some,
        "keys": torch.rand(b, 1, 1, m) > 0.3,
        "shared": torch.ones(n, m, dtype=torch.bool).tril(),
        "bias": torch.randn(b, h, n, m, dtype=torch.float64),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "rows", "keys", "shared", "bias"])
def test_attention_equals_its_reference(shape, kind, agrees):
    mask = masks(*shape[:4])[kind]
    for op, reference in (
        (attention, attention_reference),
        (attention_with_lse, attention_with_lse_reference),
    ):
        agrees(lambda *x: op(*x, mask), lambda *x: reference(*x, mask), inputs(*shape))  # noqa: B023
        agrees(lambda *x: op(*x, mask, scale=0.3), lambda *x: reference(*x, mask, scale=0.3), inputs(*shape))  # noqa: B023


def test_a_learned_bias_has_a_gradient(agrees):
    q, k, v = inputs(2, 3, 5, 7, 4)
    bias = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    agrees(attention_with_lse, attention_with_lse_reference, [q, k, v, bias])


@pytest.mark.parametrize("causal", [False, True])
def test_only_the_lse_is_used(causal, agrees):
    """The output's gradient is then zero, where the kernel's own formula would divide by zero."""
    agrees(
        lambda *x: attention_with_lse(*x, causal=causal)[1],
        lambda *x: attention_with_lse_reference(*x, causal=causal)[1],
        inputs(2, 3, 9, 9, 4),
    )


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8])
def test_the_lse_gradient_holds_for_output_gradients_of_any_size(size):
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 9, 9, 4))
    grads = [size * torch.randn(1, 2, 9, 4, dtype=torch.float64), torch.randn(1, 2, 9, dtype=torch.float64)]
    grads[0][:, :, :3] = 0
    mine = torch.autograd.grad(attention_with_lse(q, k, v), (q, k, v), grads)
    theirs = torch.autograd.grad(attention_with_lse_reference(q, k, v), (q, k, v), grads)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12 * max(1.0, size), rtol=1e-10)


@pytest.mark.parametrize("shape", [(2, 2, 0, 3, 4), (2, 2, 3, 0, 4), (0, 2, 3, 3, 4)])
def test_empty_axes(shape, agrees):
    agrees(attention_with_lse, attention_with_lse_reference, inputs(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "causal", "rows", "shared", "bias"])
def test_the_output_is_bitwise_that_of_torch(dtype, kind):
    shape = (2, 3, 33, 33, 16)
    q, k, v = inputs(*shape, dtype=dtype)
    mask = None if kind == "causal" else masks(*shape[:4])[kind]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal")
    assert torch.equal(attention_with_lse(q, k, v, mask, causal=kind == "causal")[0], wanted)
    assert torch.equal(attention(q, k, v, mask, causal=kind == "causal"), wanted)


def test_half_precision(near_in_half):
    mask = masks(2, 3, 17, 19)["rows"]
    near_in_half(lambda *x: attention_with_lse(*x, mask), inputs(2, 3, 17, 19, 8), within=16)


def test_autocast_as_torch_does_it():
    q, k, v = inputs(2, 3, 9, 9, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention_with_lse(q, k.bfloat16(), v)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k.bfloat16(), v))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


def test_gradcheck():
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 3, 5, 4))
    torch.autograd.gradcheck(attention_with_lse, (q, k, v))


@pytest.mark.parametrize("kind", ["none", "rows"])
def test_attention_traces(kind, traces):
    mask = masks(2, 3, 17, 17)[kind]
    traces(lambda *x: attention_with_lse(*x, mask), inputs(2, 3, 17, 17, 8, torch.float32))


def test_the_registered_operator_is_sound():
    q, k, v = (t.requires_grad_() for t in inputs(2, 3, 9, 9, 4))
    torch.library.opcheck(torch.ops.memlib.flash.default, (q, k, v, None, True, 0.5))


def test_mask_and_causal_are_refused_together():
    q, k, v = inputs(1, 1, 3, 3, 4)
    with pytest.raises(ValueError, match="give one"):
        attention(q, k, v, torch.ones(3, 3, dtype=torch.bool), causal=True)


def test_the_lse_gradient_is_what_the_comparison_sees(agrees, monkeypatch):
    """Mutant: the lse has no gradient."""
    module = sys.modules["memlib_kernels.attention"]
    whole = module.flash_backward

    def forgetful(grad_out, grad_lse, *rest):
        return whole(grad_out, torch.zeros_like(grad_lse), *rest)

    monkeypatch.setattr(module, "flash_backward", forgetful)
    with pytest.raises(AssertionError, match="gradient"):
        agrees(attention_with_lse, attention_with_lse_reference, inputs(2, 3, 5, 7, 4))


# ------------------------------------------------------------------------------------------------ window

WINDOWS = [(6, 9, 2), (65, 65, 3), (130, 130, 64), (200, 260, 70), (100, 700, 99), (3, 3, 1), (5, 4, 2)]


@pytest.mark.parametrize(("n", "m", "window"), WINDOWS)
def test_a_sliding_window_equals_its_reference(n, m, window, agrees, traces):
    """In blocks, of which the last may be incomplete and the first may begin before the first key."""
    options = {"causal": True, "window": window}
    both = [lambda *x, op=op: op(*x, **options) for op in (flash_attention, flash_attention_reference)]
    agrees(*both, inputs(2, 3, n, m, 4))
    agrees(*both, inputs(2, 3, n, m, 4, torch.float32), atol=1e-5)
    traces(both[0], inputs(2, 3, n, m, 4, torch.float32))


@pytest.mark.parametrize("wrong", [63, 65])
def test_a_window_off_by_one_is_seen(wrong, agrees):
    with pytest.raises(AssertionError):
        agrees(
            lambda *x: flash_attention(*x, causal=True, window=wrong),
            lambda *x: flash_attention_reference(*x, causal=True, window=64),
            inputs(2, 3, 130, 130, 4),
        )


# ------------------------------------------------------------------------------------------------ merge


def halves(split, m=11, n=6):
    """q, all keys and values, and the two parts of them."""
    q, k, v = inputs(2, 3, n, m, 4)
    return q, k, v, (k[:, :, :split], v[:, :, :split]), (k[:, :, split:], v[:, :, split:])


@pytest.mark.parametrize("split", [1, 4, 10])
def test_merge_is_one_softmax_over_both(split):
    q, k, v, a, b = halves(split)
    merged = merge(*attention_with_lse(q, *a), *attention_with_lse(q, *b))
    torch.testing.assert_close(merged, attention(q, k, v), atol=1e-12, rtol=1e-12)


def test_the_gradient_of_merge_is_that_of_one_softmax(agrees):
    def parts(q, k, v):
        return merge(
            *attention_with_lse(q, k[:, :, :4], v[:, :, :4]),
            *attention_with_lse(q, k[:, :, 4:], v[:, :, 4:]),
        )

    agrees(parts, attention, inputs(2, 3, 6, 11, 4))


def merge_inputs():
    torch.manual_seed(0)
    out_a, out_b = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(2))
    lse_a, lse_b = (torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2))
    lse_b[0, 0, 0] = -torch.inf
    lse_a[0, 1, 1] = -torch.inf
    return [out_a, lse_a, out_b, lse_b, torch.randn(3, 1, dtype=torch.float64)]


def test_merge_equals_its_reference(agrees, traces, near_in_half):
    agrees(merge, merge_reference, merge_inputs())
    traces(merge, [t.float() for t in merge_inputs()])
    near_in_half(merge, merge_inputs(), within=8)


def test_merge_is_bitwise_a_where_b_is_shut():
    out_a, lse_a, out_b, lse_b, _ = merge_inputs()
    shut = torch.full_like(lse_b, -torch.inf)
    assert torch.equal(merge(out_a, lse_a, out_b, shut), out_a)
    assert torch.equal(merge(out_a, lse_a, out_b, lse_b, -torch.inf), out_a)
    assert torch.equal(merge(out_a, lse_a, out_b, shut, torch.zeros(3, 1)), out_a)
    assert torch.equal(merge(out_a, shut, out_b, shut), out_a)
