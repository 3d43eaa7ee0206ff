"""The weighted sum of a few sources."""

from __future__ import annotations

import pytest
import torch

from memlib.ops import mix, mix_reference


def inputs(m, b=2, n=5, d=3):
    torch.manual_seed(m)
    weight = torch.softmax(torch.randn(b, n, m, dtype=torch.float64), -1)
    return [weight, *torch.randn(m, b, n, d, dtype=torch.float64)]


def listed(op):
    return lambda weight, *sources: op(weight, sources)


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_equals_its_reference(m, n, agrees):
    agrees(listed(mix), listed(mix_reference), inputs(m, n=n))


def test_other_modes(near_in_half, traces):
    near_in_half(listed(mix), inputs(4), within=8)
    traces(listed(mix), [t.float() for t in inputs(3)])
    torch.autograd.gradcheck(listed(mix), [t.requires_grad_() for t in inputs(2)])


def test_shut_sources_leave_the_first_bitwise():
    _, first, second = inputs(2)
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 5, 2)
    assert torch.equal(mix(weight, (first, second)), first)
