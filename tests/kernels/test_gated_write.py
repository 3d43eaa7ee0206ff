"""A segment's gated write: its kernels, interpreted, against float64 and token after token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib_kernels.gated_write import gated_write, gated_write_reference
from memlib_kernels.gated_write_op import gated_write_backward_op, gated_write_op
from memlib_kernels.interpreter import interpreted

FEW = settings(max_examples=3, deadline=None, derandomize=True)


def inputs(b, n, s, e, hard=True, dtype=torch.float64):
    """slots, strength, erase, values; hard: with erasures of exactly 0 and 1."""
    torch.manual_seed(n)
    erase = torch.rand(b, n, s)
    if hard:
        erase[:, ::5], erase[:, 1::5, ::2] = 0.0, 1.0
    return [t.to(dtype) for t in (torch.randn(b, s, e), torch.rand(b, n, s), erase, torch.randn(b, n, e))]


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 5, 3, 4), (1, 35, 5, 18), (1, 3, 18, 2)])
def test_within_twice_the_error_of_torch(size, within_twice_torch):
    within_twice_torch(gated_write, gated_write_reference, inputs(*size))


def test_nothing_to_write(within_twice_torch):
    for size in ((0, 3, 3, 4), (2, 3, 0, 4)):
        within_twice_torch(gated_write, gated_write_reference, inputs(*size))
    slots, *none = inputs(2, 0, 3, 4)
    with interpreted():
        assert torch.equal(gated_write(slots, *none), slots)


def test_strides_and_one_gate_for_both(within_twice_torch):
    slots, strength, erase, values = inputs(2, 6, 5, 8)
    turned = torch.rand(2, 5, 6, dtype=torch.float64).transpose(1, 2)
    tensors = [slots[..., ::2], turned, erase[:1].expand(2, 6, 5), values[..., 4:]]
    within_twice_torch(gated_write, gated_write_reference, tensors)
    tensors = [slots, strength, values]
    within_twice_torch(
        lambda m, g, v: gated_write(m, g, g, v), lambda m, g, v: gated_write_reference(m, g, g, v), tensors
    )


def test_several_tiles_of_the_width(within_twice_torch, monkeypatch):
    from memlib_kernels import gated_write_kernel

    monkeypatch.setattr(gated_write_kernel, "WIDEST", 16)
    within_twice_torch(gated_write, gated_write_reference, inputs(1, 4, 3, 19), dtypes=[torch.float32])


def test_what_is_erased_completely_leaves_nothing():
    slots, strength, erase, values = inputs(1, 20, 3, 4, hard=False, dtype=torch.float32)
    erase[:, 17] = 1.0
    with interpreted():
        found = gated_write(slots * 1e30, strength, erase, values)
    last = [t[:, 17:] for t in (strength, erase, values)]
    torch.testing.assert_close(found, gated_write_reference(torch.zeros_like(slots), *last))


def test_the_state_decides_the_dtype():
    slots, strength, erase, values = inputs(1, 4, 3, 5, dtype=torch.float32)
    small = [t.bfloat16().requires_grad_() for t in (strength, erase, values)]
    with interpreted():
        found = gated_write(slots, *small)
        grads = torch.autograd.grad(found.sum(), small)
    assert found.dtype == torch.float32 and {g.dtype for g in grads} == {torch.bfloat16}
    torch.testing.assert_close(found, gated_write_reference(slots, *small), atol=1e-6, rtol=1e-5)


@FEW
@given(b=st.integers(1, 2), n=st.integers(1, 20), s=st.integers(1, 20), e=st.integers(1, 20))
def test_any_shape(b, n, s, e):
    tensors = inputs(b, n, s, e)
    with interpreted():
        found = gated_write(*tensors)
    torch.testing.assert_close(found, gated_write_reference(*tensors))


def test_gradients_and_registration(passes_gradcheck, is_an_operator):
    passes_gradcheck(gated_write, inputs(1, 18, 2, 3, hard=False))
    tensors = inputs(1, 3, 2, 3, dtype=torch.float32)
    is_an_operator(gated_write_op, tensors)
    is_an_operator(gated_write_backward_op, (tensors[0], *tensors), gradients=False)


def compare_small(within_twice_torch):
    """The comparison that wrong kernels must fail."""
    within_twice_torch(gated_write, gated_write_reference, inputs(2, 18, 2, 3), dtypes=[torch.float64])


def test_the_right_kernel_passes(within_twice_torch):
    compare_small(within_twice_torch)


@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("tile_of", "(rows < height)", "(rows < height - 1)"),
        ("put_tile", "columns < width", "columns < width - 1"),
        ("later_of", "tokens + 1", "tokens"),
        ("later_of", " * beyond[None, :]", ""),
        ("later_of", ", reverse=True", ""),
        ("gated_write_forward", "* products", "* 1.0"),
        ("gated_write_forward", "other=0.0).to(ACC)) * later", "other=0.0).to(ACC))"),
        ("gated_write_forward", "written += kept[:, None] *", "written +="),
        ("gated_write_forward", "Erase += b * erase_b", "Erase += 0"),
        ("gated_write_later", "tiles - 1 - i", "i"),
        ("then", "add * keep_next + add_next", "add + add_next"),
        ("then", "add * keep_next + add_next", "add * keep + add_next"),
        ("gated_write_backward_slots", "kept[:, None] * grad", "grad"),
        ("gated_write_backward_slots", "derase_first = -tl.load", "derase_first = tl.load"),
        ("gated_write_backward_slots", "slots, s, n, s) * match", "slots, s, n, s)"),
        ("gated_write_backward_slots", "keep * before[None, :] + add", "keep * before[None, :]"),
        ("gated_write_backward_slots", "row_of(after, BLOCK_T - 1, BLOCK_T)", "row_of(after, 0, BLOCK_T)"),
        (
            "gated_write_backward_slots",
            "put_tile(DErase, derase, tokens + 1",
            "put_tile(DErase, derase, tokens",
        ),
        ("gated_write_backward_values", "weight *= ", "weight = "),
    ],
)
def test_wrong_kernels_are_noticed(kernel, old, new, mutated, within_twice_torch):
    mutated("gated_write_kernel", kernel, old, new)
    with pytest.raises(AssertionError, match=r"error|NaN|infinities"):
        compare_small(within_twice_torch)
