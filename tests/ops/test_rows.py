"""Rows taken and replaced by their places, and the token shift."""

from __future__ import annotations

import pytest
import torch

from memlib.ops import (
    put_rows,
    put_rows_reference,
    take_rows,
    take_rows_reference,
    token_shift,
    token_shift_reference,
)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def test_take_rows_equals_its_reference(agrees, traces):
    torch.manual_seed(0)
    for b, c, n in ((2, 7, 5), (3, 4, 9), (0, 4, 2), (2, 3, 0)):
        index = torch.randint(0, c, (b, n))
        agrees(take_rows, take_rows_reference, [random(b, c, 3), index])
        agrees(take_rows, take_rows_reference, [random(b, c), index])
    traces(take_rows, [random(2, 7, 3, dtype=torch.float32), torch.randint(0, 7, (2, 5))])


def test_put_rows_equals_its_reference(agrees, traces):
    torch.manual_seed(0)
    for b, h, c, n in ((2, 3, 9, 4), (1, 1, 5, 5), (2, 2, 5, 0)):
        place = torch.stack([torch.randperm(c)[:n] for _ in range(b)])
        inputs = [random(b, h, c, 2), random(b, h, n, 2), place, torch.rand(b, n) < 0.6]
        agrees(put_rows, put_rows_reference, inputs)
    inputs = [random(2, 3, 9, 2), random(2, 3, 4, 2), torch.arange(4).repeat(2, 1), torch.rand(2, 4) < 0.6]
    traces(put_rows, [t.float() if t.is_floating_point() else t for t in inputs])


@pytest.mark.parametrize("n", [0, 1, 2, 9])
@pytest.mark.parametrize("first", [False, True])
def test_token_shift_equals_its_reference(n, first, agrees):
    torch.manual_seed(n)
    agrees(
        token_shift, token_shift_reference, [random(2, n, 5), random(5), *([random(2, 5)] if first else [])]
    )


def test_token_shift_in_other_modes(traces, near_in_half):
    inputs = [random(2, 7, 5), torch.rand(5).double(), random(2, 5)]
    traces(token_shift, [t.float() for t in inputs])
    near_in_half(token_shift, inputs, within=16)
    torch.autograd.gradcheck(token_shift, [t.requires_grad_() for t in inputs])
