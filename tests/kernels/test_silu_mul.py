"""silu(gate) up: its kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib_kernels.interpreter import interpreted
from memlib_kernels.silu_mul import silu_mul, silu_mul_reference
from memlib_kernels.silu_mul_op import silu_mul_backward_op, silu_mul_op

FEW = settings(max_examples=6, deadline=None, derandomize=True)


def inputs(*shape, dtype=torch.float64):
    torch.manual_seed(len(shape))
    return [torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)]


@pytest.mark.parametrize("shape", [(1,), (37,), (3, 17), (2, 5, 16), (19, 33), (0, 4), (3, 0)])
def test_within_twice_the_error_of_torch(shape, within_twice_torch):
    within_twice_torch(silu_mul, silu_mul_reference, inputs(*shape))


def test_strides_and_large_numbers(within_twice_torch):
    joined = torch.randn(5, 34, dtype=torch.float64)
    within_twice_torch(
        lambda x: silu_mul(*x.chunk(2, -1)), lambda x: silu_mul_reference(*x.chunk(2, -1)), [joined]
    )
    gate, up = inputs(18, 3)
    within_twice_torch(silu_mul, silu_mul_reference, [gate.T, up.T])
    within_twice_torch(silu_mul, silu_mul_reference, [gate * 100, up * 100])


@FEW
@given(n=st.integers(1, 40), d=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_shape(n, d, seed):
    torch.manual_seed(seed)
    gate, up = torch.randn(n, d), torch.randn(n, d)
    with interpreted():
        found = silu_mul(gate, up)
    torch.testing.assert_close(found, silu_mul_reference(gate.double(), up.double()).float())


def test_gradients_and_registration(passes_gradcheck, is_an_operator):
    passes_gradcheck(silu_mul, inputs(3, 18))
    gate, up = inputs(3, 18, dtype=torch.float32)
    is_an_operator(silu_mul_op, (gate, up))
    is_an_operator(silu_mul_backward_op, (gate, gate, up), gradients=False)


def test_on_the_cpu_torch_computes_it():
    gate, up = inputs(3, 5, dtype=torch.float32)
    assert torch.equal(silu_mul(gate, up), torch.nn.functional.silu(gate) * up)
    assert silu_mul(gate, up[0]).shape == gate.shape


def compare_strided(within_twice_torch):
    """The comparison that wrong kernels must fail."""
    gate, up = inputs(3, 36)
    within_twice_torch(silu_mul, silu_mul_reference, [gate[:, ::2].contiguous(), up[:, :18]])


def test_the_right_kernel_passes(within_twice_torch):
    compare_strided(within_twice_torch)


@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("silu_mul_forward", "y = gate / ", "y = 1.0 / "),
        ("silu_mul_forward", "Up + rows * up_n", "Up + rows * gate_n"),
        ("silu_mul_forward", "rows < n", "rows < n - 1"),
        ("silu_mul_backward", "(1.0 + gate * (1.0 - s))", "(gate * (1.0 - s))"),
        ("silu_mul_backward", "dup = dout * gate * s", "dup = dout * gate"),
        ("silu_mul_backward", "columns < d", "columns < d // 16 * 16"),
    ],
)
def test_wrong_kernels_are_noticed(kernel, old, new, mutated, within_twice_torch):
    mutated("silu_mul_kernel", kernel, old, new)
    with pytest.raises(AssertionError, match=r"error|NaN"):
        compare_strided(within_twice_torch)
