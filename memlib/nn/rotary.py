"""Rotary position embedding.

Axes: b batch, h heads, n tokens, k head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memlib.ops import rotate


class RotaryPositionalEmbedding(nn.Module):
    """Rotates pairs of a head's features by an angle that grows with the position.

    angle[p, i] = p * base^(-2i / k); (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos), feature i paired
    with feature i + k/2. Scores then depend on distances only, which is what lets a padded or a
    restarted row share the batch's position counter.

    heads: [b h n k] at positions first … first + n - 1 -> [b h n k]; inverse: rotate back.
    Source: Su et al. 2021, arXiv 2104.09864.
    """

    frequency: Tensor

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim = {head_dim}: rotary positions need an even head width")
        self.head_dim, self.base = head_dim, base
        self.register_buffer("frequency", torch.empty(head_dim // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        self.frequency.copy_(self.base**-exponent)

    def forward(self, heads: Tensor, first: int = 0, inverse: bool = False) -> Tensor:
        n = heads.shape[-2]
        position = torch.arange(first, first + n, device=heads.device, dtype=self.frequency.dtype)
        angle = torch.outer(position, -self.frequency if inverse else self.frequency)
        return rotate(heads, angle.cos().to(heads.dtype), angle.sin().to(heads.dtype))
