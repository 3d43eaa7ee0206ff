"""Attention over quantised tokens: unpacking, scales, and the read."""

from __future__ import annotations

import pytest
import torch

from memlib.memory.chapters.quantization import dequantize_memory_bank, quantize_memory_bank
from memlib.ops import dequantize, dequantize_reference, quantized_read, quantized_read_reference


def tokens(bits, width=12, group=5, b=2, h=3, m=7):
    torch.manual_seed(bits)
    return quantize_memory_bank(torch.randn(b, h, m, width, dtype=torch.float64), bits, group)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [1, 4, 5, 64])
def test_dequantised_bitwise_as_the_bank_does(bits, group):
    numbers, scales = tokens(bits, group=group)
    wanted = dequantize_memory_bank(numbers, scales)
    assert torch.equal(dequantize(numbers, scales), wanted)
    assert torch.equal(dequantize_reference(numbers, scales), wanted)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_reference(bits, masked, agrees):
    (k, k_scales), (v, v_scales) = tokens(bits), tokens(bits, group=3)
    q = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 7) > 0.4 if masked else None

    def bind(op):
        return lambda q, a, b: op(q, (k, a), (v, b), mask)

    agrees(bind(quantized_read), bind(quantized_read_reference), [q, k_scales, v_scales])


@pytest.mark.parametrize("bits", [8, 4])
def test_one_bank_for_all_rows_and_other_modes(bits, agrees, near_in_half, traces):
    (k, k_scales), (v, v_scales) = tokens(bits, b=1), tokens(bits, b=1)
    q = torch.randn(2, 3, 4, 12, dtype=torch.float64)

    def read(q, a, b):
        return quantized_read(q, (k, a), (v, b))

    def reference(q, a, b):
        return quantized_read_reference(q, (k, a), (v, b))

    agrees(read, reference, [q, k_scales, v_scales])
    near_in_half(read, [q, k_scales, v_scales], within=16)
    traces(read, [q.float(), k_scales.float(), v_scales.float()])
    torch.autograd.gradcheck(read, [q.requires_grad_(), k_scales.requires_grad_(), v_scales.requires_grad_()])


def test_swapped_halves_of_a_byte_are_noticed():
    numbers, scales = tokens(4)
    swapped = (numbers >> 4) | ((numbers & 15) << 4)
    assert not torch.equal(dequantize(swapped, scales), dequantize_reference(numbers, scales))
