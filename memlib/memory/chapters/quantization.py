"""Quantization of memory tokens to 8 or 4 bits ("Core Package", docs/coverage.md).

Axes: d width of a row, g groups of a row, w values of a group.

Each group of a row has its own scale, and zero is represented exactly (symmetric):

    scale = max |x| / q_max,   q = round(x / scale),   x' = q scale,   q_max = 127 or 7

so no value is clipped and |x - x'| <= scale / 2. 8-bit values are stored as int8. Two 4-bit values share a
byte in uint8, the value with even index in the low half, each as q + 8. A row of 64 values in one group
takes 68 or 36 bytes instead of 256.

`QuantizedMemoryBank` trains with rounding (straight-through: x' in the forward pass, the gradient of x in the
backward pass). Once packed, it holds only integers and scales.
"""

from __future__ import annotations

from copy import deepcopy
from math import ceil
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.memory.chapters.banks import MemoryBank, Rows
from memlib.ops import dequantize

Q_MAX = {8: 127, 4: 7}


def quantize_memory_bank(tensor: Tensor, bits: int = 8, group_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantise a tensor [... d] to int8 [... d] or packed uint8 [... d/2], and scales [... g].

    A row is split into g = ceil(d / group_size) groups of nearly equal length. Scales have the tensor's
    type, at least float32. Raises ValueError for other bits, an odd width at 4 bits, and values that are
    not finite.
    """
    check_bits(bits, tensor.shape[-1])
    if group_size < 1:
        raise ValueError(f"group_size = {group_size}: must be at least 1")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("tensor holds inf or nan: only finite values can be quantised")
    grouped = groups(
        tensor.to(torch.promote_types(tensor.dtype, torch.float32)), ceil(tensor.shape[-1] / group_size)
    )
    scales = grouped.abs().amax(-1) / Q_MAX[bits]
    normal = scales > torch.finfo(scales.dtype).tiny  # a subnormal scale is too imprecise
    scales = torch.where(normal, scales, torch.ones_like(scales))
    q = torch.round(grouped / rearrange(scales, "... -> ... 1")).clamp(-Q_MAX[bits], Q_MAX[bits])
    flat = rearrange(q, "... g w -> ... (g w)")[..., : tensor.shape[-1]].to(torch.int8)
    return (flat if bits == 8 else pack(flat)), scales


def dequantize_memory_bank(quantized: Tensor, scales: Tensor) -> Tensor:
    """Dequantise the output of `quantize_memory_bank`: [... d], of the scales' type."""
    return dequantize(quantized, scales)


def groups(tensor: Tensor, count: int) -> Tensor:
    """Split rows into `count` groups of equal length, padded with zeros: [... d] -> [... g w]."""
    width = ceil(tensor.shape[-1] / count)
    return rearrange(F.pad(tensor, (0, count * width - tensor.shape[-1])), "... (g w) -> ... g w", g=count)


def pack(q: Tensor) -> Tensor:
    """Pack two values -8 … 7 into each byte: int8 [... d] -> uint8 [... d/2]."""
    low, high = rearrange((q + 8).to(torch.uint8), "... (d two) -> two ... d", two=2)
    return low | (high << 4)


class StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bits: int, group_size: int) -> Tensor:
        return dequantize_memory_bank(*quantize_memory_bank(tensor, bits, group_size)).to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, None


class QuantizedRows(nn.Module):
    """`Rows` that are rounded when read; after `pack` only the rounded values are stored.

    Loading a state_dict with packed values packs the module first.
    """

    quantized: Tensor
    scales: Tensor
    weight: nn.Parameter | None

    def __init__(self, rows: Rows, bits: int, group_size: int) -> None:
        super().__init__()
        check_bits(bits, rows.weight.shape[-1])
        self.bits, self.group_size, self.std = bits, group_size, rows.std
        self.weight = rows.weight

    def reset_parameters(self) -> None:
        if self.weight is not None:  # packed values have no random initialisation
            nn.init.normal_(self.weight, 0.0, self.std)

    def forward(self, index: Tensor | None = None) -> Tensor:
        if self.weight is not None:
            rows = self.weight if index is None else self.weight[index]
            return StraightThrough.apply(rows, self.bits, self.group_size)
        if index is None:
            return dequantize_memory_bank(self.quantized, self.scales)
        return dequantize_memory_bank(self.quantized[index], self.scales[index])

    @torch.no_grad()
    def pack(self) -> None:
        """Store only the rounded values; they can no longer be trained."""
        if self.weight is None:
            return
        quantized, scales = quantize_memory_bank(self.weight, self.bits, self.group_size)
        self.weight = None
        self.register_buffer("quantized", quantized)
        self.register_buffer("scales", scales)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if f"{prefix}quantized" in state_dict:
            self.pack()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, group_size={self.group_size}, packed={self.weight is None}"


class QuantizedMemoryBank(MemoryBank):
    """A bank with 8-bit or 4-bit values; of a factorised bank, both factors are quantised.

    The given bank is copied. Before `pack` it can be trained: values are stored in full precision and
    rounded at every read. After `pack` it returns bitwise the same tokens from `nbytes` bytes, in memory
    and in a file. Raises ValueError as `quantize_memory_bank` does.
    """

    def __init__(self, bank: MemoryBank, bits: int = 8, group_size: int = 64) -> None:
        super().__init__(bank.num_tokens, bank.dim)
        self.bank = deepcopy(bank)
        for parent in list(self.bank.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Rows):
                    setattr(parent, name, QuantizedRows(child, bits, group_size))

    def forward(self, index: Tensor | None = None) -> Tensor:
        return self.bank(index)

    def pack(self) -> QuantizedMemoryBank:
        """Delete the full-precision values; returns the bank itself."""
        for module in self.modules():
            if isinstance(module, QuantizedRows):
                module.pack()
        return self


def pack_memory_banks(model: nn.Module) -> int:
    """Pack every quantised bank in a model, for inference and saving; returns the number of banks."""
    banks = [module for module in model.modules() if isinstance(module, QuantizedMemoryBank)]
    for bank in banks:
        bank.pack()
    return len(banks)


def check_bits(bits: int, width: int) -> None:
    if bits not in Q_MAX:
        raise ValueError(f"bits = {bits}: must be 8 or 4")
    if bits == 4 and width % 2:
        raise ValueError(f"width = {width}: must be even, because two 4-bit values share a byte")
