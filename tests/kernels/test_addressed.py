"""Addresses by several books and the read at them: the kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib_kernels.addressed import (
    addressed_read,
    addressed_read_reference,
    addressed_weights,
    addressed_weights_reference,
)
from memlib_kernels.addressed_op import (
    addressed_read_backward_op,
    addressed_read_op,
    addressed_weights_backward_op,
    addressed_weights_op,
)
from memlib_kernels.interpreter import interpreted

FEW = settings(max_examples=4, deadline=None, derandomize=True)
SIZES = [(1, 1, 1, 1, 1, 1), (2, 5, 3, 4, 2, 6), (1, 19, 2, 17, 18, 20), (1, 1, 1, 35, 3, 33)]


def inputs(b, n, h, s, k, e, dtype=torch.float64):
    """query, table, sharpness, slots, share."""
    torch.manual_seed(n)
    share = torch.softmax(torch.randn(b, n, h), -1)
    tensors = (
        torch.randn(b, n, h, k),
        torch.randn(h, s, k),
        torch.tensor([1.7]),
        torch.randn(b, h, s, e),
        share,
    )
    return [t.to(dtype) for t in tensors]


def sharp(function, sharpness=1.7):
    """function(query, table, …) with a constant sharpness.

    The gradient of a learned one is a sum of many numbers of both signs: in half precision torch's own error
    is as large as the sum, so that gradient is compared in float64.
    """
    return lambda query, table, *rest: function(query, table, sharpness, *rest)


def compare(within_twice_torch, tensors, sharpness=1.7, **options):
    """Both operations, on query, table, sharpness, and if given slots and share."""
    query, table, learned, *rest = tensors
    weights, weights_reference = (
        sharp(addressed_weights, sharpness),
        sharp(addressed_weights_reference, sharpness),
    )
    within_twice_torch(weights, weights_reference, [query, table], **options)
    within_twice_torch(
        sharp(addressed_read, sharpness),
        sharp(addressed_read_reference, sharpness),
        [query, table, *rest],
        **options,
    )


@pytest.mark.parametrize("size", SIZES)
def test_within_twice_the_error_of_torch(size, within_twice_torch):
    tensors = inputs(*size)
    compare(within_twice_torch, tensors if size[0] == 1 else tensors[:4])


def test_a_learned_sharpness(within_twice_torch):
    tensors = inputs(2, 3, 2, 17, 3, 4)
    double = {"dtypes": [torch.float64]}
    within_twice_torch(addressed_weights, addressed_weights_reference, tensors[:3], **double)
    within_twice_torch(addressed_read, addressed_read_reference, tensors, **double)
    query, table, sharpness, slots, share = (t.float() for t in tensors)
    for op, reference, rest in (
        (addressed_weights, addressed_weights_reference, ()),
        (addressed_read, addressed_read_reference, (slots, share)),
    ):
        grads = []
        for function, dtype in ((op, torch.float32), (reference, torch.float64)):
            q, t, c, *others = (x.to(dtype) for x in (query, table, sharpness, *rest))
            with interpreted():
                y = function(q, t, c.requires_grad_(), *others)
                grads += torch.autograd.grad(y.square().sum(), c)
        torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-5)


def test_nothing_to_read(within_twice_torch):
    for size in ((2, 0, 3, 4, 2, 6), (0, 5, 3, 4, 2, 6)):
        compare(within_twice_torch, inputs(*size))


def test_strides_and_sharp_addresses(within_twice_torch):
    query, table, sharpness, slots, share = inputs(2, 5, 2, 18, 6, 7)
    wide = torch.randn(2, 2, 18, 14, dtype=torch.float64)
    turned = torch.randn(2, 2, 5, 6, dtype=torch.float64).transpose(1, 2)
    compare(
        within_twice_torch,
        [turned, table[:1].expand(2, 18, 6), sharpness, wide[..., ::2], share[:1].expand(2, 5, 2)],
    )
    compare(within_twice_torch, [query, table, sharpness, slots, share], sharpness=80.0)


def test_several_parts_and_several_tiles_of_the_width(within_twice_torch, monkeypatch):
    from memlib_kernels import addressed_kernel

    monkeypatch.setattr(addressed_kernel, "PARTS", 2)
    monkeypatch.setattr(addressed_kernel, "WIDEST", 16)
    compare(within_twice_torch, inputs(1, 37, 2, 5, 3, 35), dtypes=[torch.float32])


def test_the_state_may_have_another_dtype():
    query, table, _, slots, share = inputs(*SIZES[1], dtype=torch.float32)
    slots.requires_grad_()
    with interpreted():
        y = addressed_read(query.bfloat16(), table.bfloat16(), 2.0, slots, share)
        (grad,) = torch.autograd.grad(y.sum(), slots)
    assert y.dtype == torch.bfloat16 and grad.dtype == torch.float32
    exact = addressed_read_reference(query, table, 2.0, slots, share)
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.05)


@FEW
@given(
    b=st.integers(1, 2), n=st.integers(1, 20), h=st.integers(1, 3), s=st.integers(1, 20), e=st.integers(1, 20)
)
def test_any_shape(b, n, h, s, e):
    query, table, sharpness, slots, share = inputs(b, n, h, s, 3, e)
    with interpreted():
        found = addressed_read(query, table, sharpness, slots, share)
        address = addressed_weights(query, table, sharpness)
    torch.testing.assert_close(found, addressed_read_reference(query, table, sharpness, slots, share))
    torch.testing.assert_close(address.sum(-1), torch.ones(b, n, h, dtype=torch.float64))


def test_gradients_and_registration(passes_gradcheck, is_an_operator):
    passes_gradcheck(addressed_weights, inputs(1, 5, 2, 18, 3, 4)[:3])
    passes_gradcheck(addressed_read, inputs(1, 5, 2, 18, 3, 4))
    query, table, sharpness, slots, share = inputs(1, 2, 2, 3, 3, 4, dtype=torch.float32)
    is_an_operator(addressed_weights_op, (query, table, sharpness))
    with interpreted():
        address = addressed_weights_op(query, table, sharpness)
        y, *sums = addressed_read_op(query, table, sharpness, slots, share)
    is_an_operator(
        addressed_weights_backward_op, (address, query, table, sharpness, address), gradients=False
    )
    is_an_operator(addressed_read_op, (query, table, sharpness, slots, share))
    backward = (y, query, table, sharpness, slots, None, *sums)
    is_an_operator(addressed_read_backward_op, backward, gradients=False)


def compare_weights(within_twice_torch):
    """The comparison that wrong kernels must fail."""
    tensors = inputs(1, 35, 2, 18, 3, 4)[:3]
    within_twice_torch(addressed_weights, addressed_weights_reference, tensors, dtypes=[torch.float64])


def compare_read(within_twice_torch, given_=5):
    """The comparison that wrong kernels must fail."""
    tensors = inputs(2, 3, 2, 18, 3, 18)[:given_]
    within_twice_torch(addressed_read, addressed_read_reference, tensors, dtypes=[torch.float64])


def test_the_right_kernels_pass(within_twice_torch, monkeypatch):
    from memlib_kernels import addressed_kernel

    monkeypatch.setattr(addressed_kernel, "PARTS", 2)
    monkeypatch.setattr(addressed_kernel, "WIDEST", 16)
    compare_weights(within_twice_torch)
    compare_read(within_twice_torch)
    compare_read(within_twice_torch, 4)


@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("raised_sum", "total * shrink", "total"),
        ("scores", "(slots < s)[None, :], score", "(slots <= s)[None, :], score"),
        ("scores", " * factor", ""),
        ("addressed_weights_backward_query", "dq * factor", "dq"),
        ("addressed_weights_backward_query", "tl.sum(dq * q, 1)", "tl.sum(dq * q * factor, 1)"),
        ("addressed_weights_backward_table", "dtable * factor", "dtable"),
        ("addressed_weights_forward", "/ total[:, None]", ""),
        ("addressed_weights_forward", "Table += h * t_h", "Table += 0 * t_h"),
        ("addressed_weights_backward_query", "(da - delta[:, None])", "da"),
        ("addressed_weights_backward_query", "delta += tl.sum(a * da, 1)", "delta += tl.sum(da, 1)"),
        ("addressed_weights_backward_table", "ds = a * (", "ds = ("),
        ("addressed_weights_backward_table", "begin = tl.program_id(2) * part", "begin = 0"),
    ],
)
def test_wrong_kernels_of_the_addresses_are_noticed(kernel, old, new, mutated, within_twice_torch):
    mutated("addressed_kernel", kernel, old, new).PARTS = 2
    with pytest.raises(AssertionError, match=r"error|NaN|infinities"):
        compare_weights(within_twice_torch)


@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("addressed_read_forward", "mixed *= shrink[:, None]", "mixed *= 1.0"),
        ("addressed_read_forward", "share = 1.0 / total", "share = 1.0"),
        ("addressed_read_forward", "if SHARE:", "if False:"),
        ("addressed_read_forward", "b * m_b + h * m_h", "b * m_b"),
        ("addressed_read_backward_query", "dq * factor", "dq"),
        ("addressed_read_backward_query", "tl.sum(dq * q.to(ACC), 1)", "tl.sum(dq, 1)"),
        ("addressed_read_backward_table", "dtable * factor", "dtable"),
        ("addresses", " / total", ""),
        ("products", "range(0, e, BLOCK_E)", "range(0, BLOCK_E, BLOCK_E)"),
        ("shares", "rows.to(tl.int64) * share_n", "rows.to(tl.int64)"),
        (
            "addressed_read_backward_query",
            "tl.sum(addresses(score, top, total) * g, 1)",
            "tl.sum(g, 1)",
        ),
        ("addressed_read_backward_query", "(g - dshare[:, None])", "g"),
        ("addressed_read_backward_query", " * share[:, None]", ""),
        ("addressed_read_backward_table", "(g - dshare[None, :])", "g"),
        ("addressed_read_backward_table", "DOut += b * n * e", "DOut += 0"),
        ("addressed_read_backward_slots", "a * share[None, :]", "a"),
        ("addressed_read_backward_slots", "h * t_h", "b * t_h"),
        ("addresses_by_slot", "* factor", ""),
    ],
)
def test_wrong_kernels_of_the_read_are_noticed(kernel, old, new, mutated, within_twice_torch):
    mutated("addressed_kernel", kernel, old, new).WIDEST = 16
    with pytest.raises(AssertionError, match=r"error|NaN|infinities"):
        compare_read(within_twice_torch)


def test_without_a_share_each_book_counts_the_same(mutated, within_twice_torch):
    mutated("addressed_kernel", "addressed_read_forward", "share /= heads", "share /= 1")
    with pytest.raises(AssertionError, match="error"):
        compare_read(within_twice_torch, 4)
