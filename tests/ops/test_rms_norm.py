"""Root mean square normalisation against its formula."""

from __future__ import annotations

import pytest
import torch

from memlib.ops import rms_norm, rms_norm_reference


def inputs(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)]


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 17), (2, 0, 4), (0, 3, 4)])
def test_equals_its_reference(shape, agrees):
    agrees(rms_norm, rms_norm_reference, inputs(*shape))


def test_the_output_is_bitwise_that_of_the_reference():
    x, weight = inputs(4, 33, 128, dtype=torch.float32)
    assert torch.equal(rms_norm(x, weight), rms_norm_reference(x, weight))


def test_large_and_zero_rows(agrees):
    x, weight = inputs(4, 8)
    x[0], x[1] = 0.0, x[1] * 1e6
    agrees(rms_norm, rms_norm_reference, [x, weight])
    half = torch.full((2, 64), 3e4, dtype=torch.float16)
    assert rms_norm(half, torch.ones(64, dtype=torch.float16)).isfinite().all()


def test_other_modes(near_in_half, traces):
    near_in_half(rms_norm, inputs(3, 5, 17), within=16)
    traces(rms_norm, inputs(3, 5, 17, dtype=torch.float32))
    torch.autograd.gradcheck(rms_norm, [t.requires_grad_() for t in inputs(2, 3, 4)])


def test_mixed_dtypes_follow_x():
    x, weight = inputs(3, 8, dtype=torch.float32)
    assert rms_norm(x.bfloat16(), weight).dtype == torch.bfloat16
