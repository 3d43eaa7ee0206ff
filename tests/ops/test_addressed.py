"""Addresses by several books, and reading at them."""

from __future__ import annotations

import pytest
import torch

from memlib.ops import (
    addressed_read,
    addressed_read_reference,
    addressed_weights,
    addressed_weights_reference,
)

SIZES = [(1, 1, 1, 1, 1, 1), (2, 5, 3, 4, 2, 6), (2, 33, 4, 17, 5, 3)]


def inputs(b, n, h, s, k, e, dtype=torch.float64):
    """query, table, sharpness, slots, share."""
    torch.manual_seed(n)
    share = torch.softmax(torch.randn(b, n, h), -1)
    shapes = torch.randn(b, n, h, k), torch.randn(h, s, k), torch.tensor(1.7), torch.randn(b, h, s, e), share
    return [t.to(dtype) for t in shapes]


@pytest.mark.parametrize("size", SIZES)
def test_equals_its_reference(size, agrees):
    tensors = inputs(*size)
    agrees(addressed_weights, addressed_weights_reference, tensors[:3])
    agrees(addressed_read, addressed_read_reference, tensors[:4])
    agrees(addressed_read, addressed_read_reference, tensors)


def test_no_tokens_and_no_rows(agrees):
    agrees(addressed_read, addressed_read_reference, inputs(2, 0, 3, 4, 2, 6))
    agrees(addressed_read, addressed_read_reference, inputs(0, 5, 3, 4, 2, 6))


def test_other_modes(near_in_half, traces):
    tensors = inputs(*SIZES[1])
    near_in_half(addressed_read, tensors, within=16)
    traces(addressed_read, [t.float() for t in tensors])
    torch.autograd.gradcheck(addressed_read, [t.requires_grad_() for t in inputs(1, 2, 2, 3, 2, 2)])


def test_addresses_sum_to_one_in_each_book():
    address = addressed_weights(*inputs(*SIZES[2])[:3])
    torch.testing.assert_close(address.sum(-1), torch.ones(2, 33, 4, dtype=torch.float64))


def test_the_state_may_have_another_dtype():
    query, table, sharpness, slots, share = inputs(*SIZES[1], dtype=torch.float32)
    assert addressed_read(query.bfloat16(), table.bfloat16(), 2.0, slots, share).dtype == torch.bfloat16
