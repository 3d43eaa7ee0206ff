"""Eight and four bits: the error bound, the bytes, the packing, training through rounding, files."""

from copy import deepcopy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from memlib import (
    FactorizedMemoryBank,
    MemoryTransformer,
    QuantizedMemoryBank,
    ReducedDimMemoryBank,
    StandardMemoryBank,
    dequantize_memory_bank,
    load_checkpoint,
    pack_memory_banks,
    quantize_memory_bank,
    save_checkpoint,
)
from memlib.config import Config, override
from memlib.memory.chapters.quantization import pack
from memlib.ops import dequantize

both = pytest.mark.parametrize("bits", [8, 4])
BANKS = {
    "standard": lambda: StandardMemoryBank(16, 128, init_std=1.0),
    "factorized": lambda: FactorizedMemoryBank(16, 128, rank=64),
    "reduced": lambda: ReducedDimMemoryBank(16, rank=64),
}
every_bank = pytest.mark.parametrize("make", BANKS.values(), ids=BANKS.keys())


def unpacked(packed):
    return dequantize(packed, torch.ones(*packed.shape[:-1], 1)).to(torch.int8)


def spread(scales, width):
    """The scale of each number: scales [m g] -> [m width], in a plain loop over places."""
    size = -(-width // scales.shape[-1])
    return torch.stack([scales[..., place // size] for place in range(width)], -1)


@st.composite
def tensors(draw):
    rows, width = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 20))
    number = st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100
    )
    numbers = draw(st.lists(number, min_size=rows * width, max_size=rows * width))
    return torch.tensor(numbers).reshape(rows, width)


@given(tensor=tensors(), bits=st.sampled_from([8, 4]), group_size=st.integers(1, 50))
@example(tensor=torch.tensor([[190 * 2.0**-149, 0.0]]), bits=8, group_size=64)  # a scale below all numbers
@settings(max_examples=300, deadline=None)
def test_no_number_is_off_by_more_than_half_a_scale(tensor, bits, group_size):
    quantized, scales = quantize_memory_bank(tensor, bits, group_size)
    back = dequantize_memory_bank(quantized, scales)
    scale = spread(scales, tensor.shape[-1]).double()
    bound = scale / 2 + 1e-6 * tensor.double().abs()  # and float32's own rounding of a product
    assert ((back.double() - tensor.double()).abs() <= bound).all()
    assert scales.shape[-1] == -(-tensor.shape[-1] // group_size)


@both
def test_the_bound_is_reached(bits):
    """A looser rounding (towards zero) breaks it: the bound is not an empty one."""
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    quantized, scales = quantize_memory_bank(tensor, bits)
    off = (dequantize_memory_bank(quantized, scales) - tensor).abs() / spread(scales, 64)
    assert 0.49 < float(off.max()) <= 0.5001
    truncated = torch.trunc(tensor / spread(scales, 64)) * spread(scales, 64)
    assert float(((truncated - tensor).abs() / spread(scales, 64)).max()) > 0.9


@both
@pytest.mark.parametrize("width", [2, 64, 100, 130])
def test_equals_torchs_fake_quantisation(bits, width):
    """The same numbers as torch's per-channel operator on one group a channel, at the same scales."""
    tensor = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    quantized, scales = quantize_memory_bank(tensor, bits)
    got, top = dequantize_memory_bank(quantized, scales), {8: 127, 4: 7}[bits]
    size = -(-width // scales.shape[-1])
    for g in range(scales.shape[-1]):
        part = tensor[:, g * size : (g + 1) * size]
        torch.testing.assert_close(scales[:, g], part.abs().amax(1) / top)
        zero = torch.zeros(5, dtype=torch.int32)
        want = torch.fake_quantize_per_channel_affine(part, scales[:, g], zero, 0, -top, top)
        torch.testing.assert_close(got[:, g * size : (g + 1) * size], want)


@pytest.mark.filterwarnings("ignore:torch.quantize_per")
def test_eight_bits_against_torchs_stored_kind():
    """torch.quantize_per_channel stores int8 too, with a float64 scale and an int64 zero for each row."""
    tensor = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    quantized, scales = quantize_memory_bank(tensor, 8)
    zeros = torch.zeros(256, dtype=torch.int64)
    theirs = torch.quantize_per_channel(tensor, scales[:, 0].double(), zeros, 0, torch.qint8)
    assert torch.equal(theirs.int_repr(), quantized)
    torch.testing.assert_close(theirs.dequantize(), dequantize_memory_bank(quantized, scales))
    bytes_of = theirs.int_repr().nbytes + 256 * (8 + 8)
    assert quantized.nbytes + scales.nbytes == 256 * 68 < bytes_of


@both
@pytest.mark.parametrize("group_size", [16, 64])
def test_equals_torchaos_numbers_and_scales(peer, bits, group_size):
    """torchao's symmetric quantisation of the same groups, kept to as many steps up as down."""
    ao = peer("torchao.quantization.quant_primitives")
    tensor = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    top, block = {8: 127, 4: 7}[bits], (1, group_size)
    scale, zero = ao.choose_qparams_affine(tensor, ao.MappingType.SYMMETRIC, block, torch.int8, -top, top)
    theirs = ao.quantize_affine(tensor, block, scale, zero, torch.int8, -top, top)
    quantized, scales = quantize_memory_bank(tensor, bits, group_size)
    assert torch.equal(scales, scale.view_as(scales))
    assert torch.equal(unpacked(quantized) if bits == 4 else quantized, theirs)
    back = ao.dequantize_affine(theirs, block, scale, zero, torch.int8, -top, top)
    torch.testing.assert_close(dequantize_memory_bank(quantized, scales), back)


@pytest.mark.parametrize(("bits", "error", "size"), [(8, 1.0, 0.99), (4, 1.06, 0.53)])
def test_error_and_bytes_against_what_torchao_stores(peer, bits, error, size):
    """A bank of 12,288 tokens of 64. At 4 bits torchao uses all 16 steps (-8 … 7, the highest clipped)
    and keeps each in a byte; here 15 of them, two to a byte."""
    ao, per_group = peer("torchao.quantization"), peer("torchao.quantization.granularity").PerGroup(64)
    tensor = torch.randn(12288, 64, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(64, 12288, bias=False)
    linear.weight = nn.Parameter(tensor.clone())
    ao.quantize_(linear, ao.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity=per_group))
    stored = linear.weight
    quantized, scales = quantize_memory_bank(tensor, bits)
    mine = (
        dequantize_memory_bank(quantized, scales).sub(tensor).norm() / tensor.norm(),
        quantized.nbytes + scales.nbytes,
    )
    theirs = (
        stored.dequantize().sub(tensor).norm() / tensor.norm(),
        sum(getattr(stored, name).nbytes for name in stored.tensor_data_names),
    )
    print(f"{bits} bits: error {mine[0]:.4f}, torchao {theirs[0]:.4f}; {mine[1]:,} and {theirs[1]:,} bytes")
    assert mine[0] <= error * theirs[0] and mine[1] <= size * theirs[1]


@both
def test_a_scale_for_each_group_is_nearer_than_one_for_each_row(bits):
    """Against torch's per-channel operator as it is meant, a scale for each row of 768 numbers."""
    tensor = torch.randn(128, 768, generator=torch.Generator().manual_seed(0))
    quantized, scales = quantize_memory_bank(tensor, bits)
    top, zeros = {8: 127, 4: 7}[bits], torch.zeros(128, dtype=torch.int32)
    by_row = torch.fake_quantize_per_channel_affine(tensor, tensor.abs().amax(1) / top, zeros, 0, -top, top)
    mine, theirs = (
        float((other - tensor).square().mean().sqrt())
        for other in (dequantize_memory_bank(quantized, scales), by_row)
    )
    print(f"{bits} bits: rms error {mine:.4f} against {theirs:.4f}, {quantized.nbytes + scales.nbytes} bytes")
    assert mine < 0.85 * theirs
    assert quantized.nbytes + scales.nbytes == 128 * 768 * bits // 8 + 4 * 128 * 12


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda x: len(x) % 2 == 0))
def test_two_numbers_share_a_byte(numbers):
    tensor = torch.tensor(numbers, dtype=torch.int8)
    packed = pack(tensor)
    assert packed.nbytes == len(numbers) // 2 and torch.equal(unpacked(packed), tensor)
    by_hand = [(numbers[i] + 8) + 16 * (numbers[i + 1] + 8) for i in range(0, len(numbers), 2)]
    assert packed.tolist() == by_hand


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_and_shapes(bits, dtype):
    tensor = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantized, scales = quantize_memory_bank(tensor, bits)
    assert scales.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    back = dequantize_memory_bank(quantized, scales)
    assert back.shape == tensor.shape
    assert float((back - tensor).abs().max()) <= float(scales.max()) / 2 * 1.0001


@both
def test_zeros_stay_zeros(bits):
    assert not dequantize_memory_bank(*quantize_memory_bank(torch.zeros(2, 8), bits)).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_memory_bank(torch.zeros(1, 4), 3), "bits = 3: must be 8 or 4"),
        (lambda: quantize_memory_bank(torch.zeros(1, 5), 4), "width = 5: must be even"),
        (lambda: quantize_memory_bank(torch.zeros(1, 4), 8, 0), "group_size = 0: must be at least 1"),
        (lambda: quantize_memory_bank(torch.tensor([1.0, torch.inf])), "holds inf or nan"),
        (
            lambda: QuantizedMemoryBank(StandardMemoryBank(2, 5), bits=4),
            "width = 5: must be even",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- banks


@both
@every_bank
def test_a_packed_bank_is_the_trained_one_in_fewer_bytes(make, bits):
    bank = make()
    numbers = sum(p.numel() for p in bank.parameters())
    quantized = QuantizedMemoryBank(bank, bits)
    before, some = quantized(), quantized(torch.tensor([3, 1]))
    assert quantized.nbytes == 4 * numbers
    quantized.pack()
    assert torch.equal(quantized(), before) and torch.equal(quantized(torch.tensor([3, 1])), some)
    assert quantized.nbytes == numbers * bits // 8 + 4 * numbers // 64
    assert list(quantized.parameters()) == []
    assert all(b.dtype in (torch.int8, torch.uint8, torch.float32) for b in quantized.buffers())


@both
@every_bank
def test_the_gradient_goes_straight_through(make, bits):
    """The gradient of a loss is that of the tokens as they were read, handed to the numbers in full."""
    bank = make()
    quantized = QuantizedMemoryBank(bank, bits)
    seen = deepcopy(bank)
    pairs = list(zip(seen.parameters(), quantized.parameters(), strict=True))
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(dequantize_memory_bank(*quantize_memory_bank(theirs, bits)))
    target = torch.randn(16, bank.dim, generator=torch.Generator().manual_seed(1))
    for some in (seen, quantized):
        (some() - target).square().sum().backward()
    for mine, theirs in pairs:
        assert theirs.grad.any()
        torch.testing.assert_close(theirs.grad, mine.grad)


@both
def test_training_through_rounding_beats_rounding_afterwards(bits):
    """A bank read through a fixed map must say given things: rounded from the start it learns to."""
    torch.manual_seed(0)
    reader, target = torch.randn(64, 8) / 8, torch.randn(16, 8)

    def trained(quantised):
        torch.manual_seed(1)
        bank = StandardMemoryBank(16, 64, init_std=1.0)
        bank = QuantizedMemoryBank(bank, bits) if quantised else bank
        optimizer = torch.optim.Adam(bank.parameters(), lr=0.02)
        losses = []
        for _ in range(300):
            loss = (bank() @ reader - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        packed = bank if quantised else QuantizedMemoryBank(bank, bits)
        return losses[0], float((packed.pack()() @ reader - target).square().mean().detach())

    first, during = trained(True)
    _, afterwards = trained(False)
    assert during < 0.05 * first
    assert during < 0.7 * afterwards


@both
@every_bank
def test_a_quantised_bank_saves_and_loads_quantised(make, bits, tmp_path):
    bank = QuantizedMemoryBank(make(), bits).pack()
    file = tmp_path / "bank.safetensors"
    save_model(bank, str(file))
    stored = load_file(file)
    assert {t.dtype for t in stored.values()} == {torch.int8 if bits == 8 else torch.uint8, torch.float32}
    assert sum(t.nbytes for t in stored.values()) == bank.nbytes
    for other in (QuantizedMemoryBank(make(), bits), QuantizedMemoryBank(make(), bits).pack()):
        load_model(other, file)
        assert other.nbytes == bank.nbytes and torch.equal(other(), bank())


def test_a_bank_is_copied_not_changed():
    bank = StandardMemoryBank(4, 8)
    before = bank().clone()
    QuantizedMemoryBank(bank, 4).pack()
    assert torch.equal(bank(), before) and isinstance(bank.tokens.weight, nn.Parameter)


@both
def test_a_model_with_a_packed_bank_says_the_same_and_loads(bits, tmp_path):
    config = override(
        Config(),
        {
            "model.hidden_dim": 16,
            "model.num_heads": 2,
            "model.num_layers": 2,
            "model.intermediate_dim": 16,
            "model.vocab_size": 11,
            "model.segment_length": 4,
            "memory.kinds": ["chapters"],
            "memory.memory_sharing": "shared",
            "memory.chapters.num_memory_tokens": 16,
            "memory.chapters.init_std": 1.0,
            "memory.chapters.num_chapters": 4,
            "memory.chapters.top_k_chapters": 2,
            "memory.chapters.quantize_memory": True,
            "memory.chapters.memory_quant_bits": bits,
        },
    )
    model, tokens = MemoryTransformer(config).eval(), torch.arange(22).reshape(2, 11) % 11
    before = model(tokens).logits
    assert pack_memory_banks(model) == 1
    assert torch.equal(model(tokens).logits, before)
    file = tmp_path / "model.safetensors"
    save_model(model, str(file))
    other = MemoryTransformer(config).eval()
    pack_memory_banks(other)
    load_model(other, file)
    assert torch.equal(other(tokens).logits, before)
    save_checkpoint(model, tmp_path / "step-1")
    third = MemoryTransformer(config).eval()
    load_checkpoint(tmp_path / "step-1", third)
    assert torch.equal(third(tokens).logits, before)
