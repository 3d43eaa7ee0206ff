"""Operations without gradients: the same numbers, by less work; and gradients under torch.func."""

from __future__ import annotations

import pytest
import torch

from memlib import ops
from memlib_kernels.dispatch import apply
from memlib_kernels.rms_norm import RMSNorm


def calls():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8), torch.rand(8)
    heads, angle = torch.randn(2, 2, 5, 8), torch.randn(5, 4)
    rates = torch.rand(2, 5, 6) / 2
    index = torch.randint(0, 7, (2, 2, 5, 3))
    return {
        "rms_norm": (ops.rms_norm, (x, weight)),
        "rotate": (ops.rotate, (heads, angle.cos(), angle.sin())),
        "token_shift": (ops.token_shift, (x, weight)),
        "addressed_weights": (ops.addressed_weights, (torch.randn(2, 5, 2, 4), torch.randn(2, 6, 4))),
        "gated_write": (ops.gated_write, (torch.randn(2, 6, 8), rates, rates / 2, x)),
        "selected_scores": (ops.selected_scores, (heads, torch.randn(2, 2, 7, 8), index)),
        "selected_sum": (ops.selected_sum, (torch.rand(2, 2, 5, 3), torch.randn(2, 2, 7, 8), index)),
    }


@pytest.mark.parametrize("name", calls())
def test_results_without_gradients_are_those_with_them(name):
    op, tensors = calls()[name]
    learned = [
        t.clone().requires_grad_() if i == 0 and t.is_floating_point() else t for i, t in enumerate(tensors)
    ]
    recorded = op(*learned)
    assert recorded.requires_grad
    with torch.inference_mode():
        assert torch.equal(op(*learned), recorded)
    with torch.no_grad():
        alone = op(*learned)
    assert torch.equal(alone, recorded) and not alone.requires_grad


def test_gradients_of_torch_func_are_recorded():
    x, weight = torch.randn(3, 8), torch.rand(8)

    def loss(x):
        return apply(RMSNorm, x, weight, 1e-6)[0].square().sum()

    with torch.inference_mode():
        found = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(found, wanted)
