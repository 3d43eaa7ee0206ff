"""Random numbers from a seed and a position, the same in torch and in a kernel.

Philox4x32-10 scrambles a counter, here an element's number, with a key, the seed. Nothing is stored: the
backward pass makes the forward pass's numbers again. Triton's `tl.rand` is the same function.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 2**32 - 1  # the low half of 64 bits


def uniform(seed: int, shape: torch.Size, device: torch.device | None = None) -> Tensor:
    """Numbers in 0 … 1 of the seed's stream, in row-major order: float32, of the given shape."""
    count = shape.numel()
    return uniform_from_bits(philox(seed, torch.arange(count, device=device)).view(shape))


def uniform_from_bits(bits: Tensor) -> Tensor:
    """32 random bits -> a number in 0 … 1, as `tl.rand` makes it."""
    signed = torch.where(bits > LOW // 2, bits - 2**32, bits)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * 4.6566127342e-10


def philox(seed: int | Tensor, counter: Tensor) -> Tensor:
    """The first word of Philox4x32-10 for each counter: int64, of 32 bits. 64-bit products wrap around.

    seed: one, or a tensor that is broadcast with the counters.
    """
    key = [seed & LOW, seed >> 32 & LOW]
    word = [counter & LOW, counter >> 32 & LOW, torch.zeros_like(counter), torch.zeros_like(counter)]
    for _ in range(10):
        even, odd = word[0] * 0xD2511F53, word[2] * 0xCD9E8D57
        word = [
            odd >> 32 & LOW ^ word[1] ^ key[0],
            odd & LOW,
            even >> 32 & LOW ^ word[3] ^ key[1],
            even & LOW,
        ]
        key = [key[0] + 0x9E3779B9 & LOW, key[1] + 0xBB67AE85 & LOW]
    return word[0]
