"""The merge of two attentions: the interpreted kernels against float64, and one softmax over both."""

from __future__ import annotations

import pytest
import torch

from memlib_kernels.attention import flash_attention, flash_attention_reference, merge, merge_reference
from memlib_kernels.interpreter import interpreted
from memlib_kernels.merge_op import merge_backward_op, merge_op


def inputs(*shape, dtype=torch.float64):
    torch.manual_seed(len(shape))
    out_a, out_b = torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)
    lse_a, lse_b, logit = (torch.randn(*shape[:-1], dtype=dtype) for _ in range(3))
    return [out_a, lse_a, out_b, lse_b, logit]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 24), (1, 2, 19, 16)])
def test_within_twice_the_error_of_torch(shape, within_twice_torch):
    within_twice_torch(merge, merge_reference, inputs(*shape), theirs=merge)


def test_one_softmax_over_both_sets_of_keys():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (9, 30, 30))
    with interpreted():
        parts = flash_attention(q, k[:, :, :13], v[:, :, :13]), flash_attention(q, k[:, :, 13:], v[:, :, 13:])
        both = merge(*parts[0], *parts[1])
    torch.testing.assert_close(both, flash_attention_reference(q, k, v)[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("by_logit", [False, True])
def test_a_shut_side_leaves_the_other_bit_for_bit(by_logit):
    out_a, lse_a, out_b, lse_b, logit = inputs(2, 2, 5, 16, dtype=torch.float32)
    out_b[0], (logit if by_logit else lse_b)[0] = torch.nan, -torch.inf
    out_a.requires_grad_()
    with interpreted() as record:
        out = merge(out_a, lse_a, out_b, lse_b, logit)
        (grad,) = torch.autograd.grad(out[0].sum(), out_a)
    assert record.launches
    assert torch.equal(out[0], out_a[0]) and not torch.equal(out[1], out_a[1])
    assert torch.equal(grad[0], torch.ones_like(grad[0]))


def test_gradients_and_registration(passes_gradcheck, is_an_operator):
    passes_gradcheck(merge, inputs(1, 2, 3, 16))
    out_a, lse_a, out_b, lse_b, _ = inputs(2, 2, 5, 16, dtype=torch.float32)
    is_an_operator(merge_op, (out_a, lse_a, out_b, lse_b))
    is_an_operator(merge_backward_op, (out_a, out_a, lse_a, out_b, lse_b), gradients=False)


@pytest.mark.parametrize(
    "function, old, new",
    [
        ("merge_forward", "a + w * (b - a)", "b + w * (a - b)"),
        ("share_of_b", "tl.exp(a - ", "tl.exp(0 * a - "),
        ("merge_backward", "w * (1.0 - w)", "w"),
        ("merge_backward", "(1.0 - w)[:, None]", "w[:, None]"),
        ("merge_backward", "tl.sum(dout * (b - a), 1)", "tl.sum(dout * b, 1)"),
    ],
)
def test_wrong_kernels_are_noticed(function, old, new, mutated, within_twice_torch):
    mutated("merge_kernel", function, old, new)
    with pytest.raises(AssertionError, match=r"error|NaN"):
        within_twice_torch(merge, merge_reference, inputs(2, 3, 5, 24), theirs=merge, dtypes=[torch.float32])
