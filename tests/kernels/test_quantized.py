"""Attention over quantised tokens: its kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib.memory.chapters.quantization import quantize_memory_bank
from memlib_kernels.interpreter import interpreted
from memlib_kernels.quantized import dequantize, quantized_read, quantized_read_reference
from memlib_kernels.quantized_op import quantized_read_backward_op, quantized_read_op

FEW = settings(max_examples=4, deadline=None, derandomize=True)


def inputs(bits=8, b=2, h=2, n=3, m=5, k=8, e=14, group=4, shared=False, dtype=torch.float64):
    """q, keys, key scales, values, value scales."""
    torch.manual_seed(bits)
    rows = (1, 1) if shared else (b, h)
    tokens = [quantize_memory_bank(torch.randn(*rows, m, width), bits, group) for width in (k, e)]
    return [
        t.to(dtype) if t.is_floating_point() else t for t in (torch.randn(b, h, n, k), *tokens[0], *tokens[1])
    ]


def bind(function, mask=None, **options):
    def call(q, keys, key_scales, values, value_scales):
        return function(q, (keys, key_scales), (values, value_scales), mask, **options)

    return call


def compare(within_twice_torch, tensors, mask=None, dtypes=None, **options):
    """Torch in the same precision is the CPU path: the reference rounds only at the end."""
    given_ = {} if dtypes is None else {"dtypes": dtypes}
    read, reference = (bind(f, mask, **options) for f in (quantized_read, quantized_read_reference))
    within_twice_torch(read, reference, tensors, theirs=read, **given_)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "size",
    [
        {"b": 1, "h": 1, "n": 1, "m": 1, "k": 2, "e": 2, "group": 2},
        {"b": 1, "h": 1, "n": 19, "m": 35, "k": 30, "e": 24, "group": 8},
        {"shared": True, "group": 64},
    ],
)
def test_within_twice_the_error_of_torch(bits, size, within_twice_torch):
    compare(within_twice_torch, inputs(bits, **size))


@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 3, 5), (1, 5)])
def test_masks(shape, within_twice_torch):
    torch.manual_seed(0)
    allowed = torch.rand(shape) > 0.4
    allowed[..., 0, :] = False  # a query that may attend to nothing
    compare(within_twice_torch, inputs(), allowed)
    compare(within_twice_torch, inputs(4), torch.randn(shape))


def test_scale_and_strides(within_twice_torch):
    _, keys, key_scales, values, value_scales = inputs(8, b=1, n=4, m=18, k=8, e=8)
    turned = torch.randn(1, 4, 2, 8, dtype=torch.float64).transpose(1, 2)
    both = torch.cat((keys, values), -1)
    value_scales = value_scales.transpose(2, 3).contiguous().transpose(2, 3)
    tensors = [turned, both[..., :8], key_scales, both[..., 8:], value_scales]
    compare(within_twice_torch, tensors, scale=0.3)


def test_large_logits(within_twice_torch):
    q, *tokens = inputs(8, b=1, n=19, m=18, k=8, e=8)
    compare(within_twice_torch, [q * 40, *tokens])


def test_keys_of_8_and_values_of_4_bits(within_twice_torch):
    q, keys, key_scales, *_ = inputs(8)
    *_, values, value_scales = inputs(4)
    compare(within_twice_torch, [q, keys, key_scales, values, value_scales])


@pytest.mark.parametrize("triton", [True, False])
def test_a_projection_of_the_bank_can_be_absorbed(triton):
    q, bank, scales, *_ = inputs(4, k=12, shared=True)
    w_k, w_v = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    q = q[..., :4]
    wide = dequantize(bank, scales)
    weight = torch.softmax(q @ (wide @ w_k).transpose(-1, -2) / 2, -1)
    absorbed = q @ w_k.T, (bank, scales), (bank, scales)
    if triton:
        with interpreted():
            found = quantized_read(*absorbed, scale=0.5)
    else:
        found = quantized_read(*absorbed, scale=0.5)
    torch.testing.assert_close(found @ w_v, weight @ (wide @ w_v))


def test_a_learned_bias_gets_its_gradient_from_torch():
    tensors = inputs(dtype=torch.float32)
    bias = torch.zeros(3, 5, requires_grad=True)
    with interpreted() as record:
        bind(quantized_read, bias)(*tensors).sum().backward()
    assert bias.grad.abs().sum() > 0
    assert not any(name.startswith("quantized") for name, _ in record.launches)


def test_groups_that_no_kernel_takes_are_read_by_torch():
    tensors = inputs(k=18, e=18, group=6)
    with interpreted() as record:
        found = bind(quantized_read)(*tensors)
    assert not any(name.startswith("quantized") for name, _ in record.launches)
    torch.testing.assert_close(found, bind(quantized_read_reference)(*tensors))


@FEW
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    k=st.integers(1, 9),
    group=st.sampled_from([1, 2, 4, 64]),
    bits=st.sampled_from([4, 8]),
)
def test_any_shape(n, m, k, group, bits):
    tensors = inputs(bits, 1, 1, n, m, 2 * k, 2, group)
    with interpreted():
        found = bind(quantized_read)(*tensors)
    torch.testing.assert_close(found, bind(quantized_read_reference)(*tensors))


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_and_registration(bits, passes_gradcheck, is_an_operator):
    passes_gradcheck(bind(quantized_read), inputs(bits, b=1, n=3, m=18))
    tensors = inputs(bits, b=1, n=2, m=3, shared=True, dtype=torch.float32)
    mask = torch.rand(2, 3) > 0.4 if bits == 4 else None
    is_an_operator(quantized_read_op, (*tensors, mask, 0.4))
    with interpreted():
        out, *sums = quantized_read_op(*tensors, mask, 0.4)
    backward = (out, *tensors, mask, out, *sums, 0.4, True)
    is_an_operator(quantized_read_backward_op, backward, gradients=False)


def test_scales_without_a_gradient_cost_no_kernel():
    q, *tokens = inputs(dtype=torch.float32)
    with interpreted() as record:
        bind(quantized_read)(q.requires_grad_(), *tokens).sum().backward()
    assert [name for name, _ in record.launches] == ["quantized_forward", "quantized_backward_queries"]


def compare_masked(within_twice_torch):
    """The comparison that wrong kernels must fail. Later keys are larger: the second tile raises maxima."""
    mask = torch.ones(3, 18, dtype=torch.bool)
    mask[0], mask[1, ::3] = False, False
    tensors = inputs(4, b=1, m=18)
    tensors[2][:, :, 16:] *= 4
    compare(within_twice_torch, tensors, mask, [torch.float64])


def test_the_right_kernel_passes(within_twice_torch):
    compare_masked(within_twice_torch)


@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("numbers_of", "bytes_ & 15, bytes_ >> 4", "bytes_ >> 4, bytes_ & 15"),
        ("numbers_of", "- 8.0", "- 7.0"),
        ("scaled", "+ place[None, :]", "+ 0 * place[None, :]"),
        ("scaled", "* scales[:, :, None]", ""),
        ("masked_scores", "(tokens < m)", "(tokens < m - 1)"),
        ("quantized_forward", "out_dtype=ACC) * scale", "out_dtype=ACC)"),
        ("quantized_backward_queries", "out_dtype=ACC) * scale", "out_dtype=ACC)"),
        ("quantized_backward_scales", "out_dtype=ACC) * scale", "out_dtype=ACC)"),
        ("masked_scores", "* mask_n", "* mask_m"),
        ("quantized_forward", "total = total * shrink", "total = total"),
        ("quantized_forward", "mixed *= shrink[:, None]", "mixed *= 1.0"),
        ("quantized_forward", "/ total[:, None]", "/ 1.0"),
        ("quantized_forward", "tl.where(empty, 1.0, total)", "total"),
        ("quantized_forward", "raised == float", "raised != float"),
        ("quantized_backward_queries", "(dp - delta[:, None])", "dp"),
        ("quantized_backward_queries", "dq * scale", "dq"),
        ("quantized_backward_scales", "(dp - delta[None, :])", "dp"),
        ("quantized_backward_scales", "dk * scale * k_numbers", "dk * k_numbers"),
        ("quantized_backward_scales", "dk * scale * k_numbers", "dk * scale"),
        ("quantized_backward_scales", "dv * v_numbers", "dv"),
        ("put_group_sums", "* groups", ""),
        ("place_of", "(b * heads + h)", "b * heads"),
    ],
)
def test_wrong_kernels_are_noticed(kernel, old, new, mutated, within_twice_torch):
    mutated("quantized_kernel", kernel, old, new)
    with pytest.raises(AssertionError, match=r"error|NaN|infinities"):
        compare_masked(within_twice_torch)
