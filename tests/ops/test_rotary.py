"""Rotation by angles against pairs turned one by one."""

from __future__ import annotations

import pytest
import torch

from memlib.ops import rotate, rotate_reference


def inputs(b, h, n, k, dtype=torch.float64):
    torch.manual_seed(n)
    angle = torch.randn(n, k // 2)
    return torch.randn(b, h, n, k, dtype=dtype), angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("size", [(2, 3, 5, 4), (1, 1, 1, 2), (2, 2, 0, 4), (0, 2, 3, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_its_reference(size, transposed, agrees):
    heads, cos, sin = inputs(*size)

    def of(op):
        return lambda x: op(x.transpose(1, 2) if transposed else x, cos, sin)

    agrees(of(rotate), of(rotate_reference), [heads.transpose(1, 2) if transposed else heads])


def test_other_modes(traces, near_in_half):
    heads, cos, sin = inputs(2, 3, 5, 4)
    near_in_half(lambda x: rotate(x, cos.to(x.dtype), sin.to(x.dtype)), [heads])
    heads, cos, sin = inputs(2, 3, 5, 4, torch.float32)
    traces(lambda x: rotate(x, cos, sin), [heads])
    heads, cos, sin = inputs(1, 2, 3, 4)
    torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), [heads.requires_grad_()])
