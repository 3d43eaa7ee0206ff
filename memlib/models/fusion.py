"""How a block joins its attention with what its memories read.

Axes: b batch, n tokens, d hidden, m sources (the attention first, then the memories).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memlib.memory.gates import Gate
from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import Linear
from memlib.ops import mix


class SoftmaxFusion(nn.Module):
    """The gating network: H = g[0] A + g[1] M_1 + g[2] M_2 + …,  g = softmax(h W_g + b_g) per token.

    hidden, attended: [b n d]; memories: list of [b n d] -> [b n d].
    Source: "Architecture Diagrams", Memory Fusion Equation (docs/coverage.md).
    """

    def __init__(self, hidden_dim: int, num_memories: int) -> None:
        super().__init__()
        self.gate = Gate(hidden_dim, 1 + num_memories)
        self.weight_point = HookPoint("fusion.weight", "batch token source")

    def forward(self, hidden: Tensor, attended: Tensor, memories: list[Tensor]) -> Tensor:
        weight = torch.softmax(self.gate(hidden), -1)
        self.weight_point(weight)
        return mix(weight, (attended, *memories))

    @torch.no_grad()
    def close(self) -> None:
        """Shut the memories out for good: g = (1, 0, …), exactly the plain transformer."""
        self.gate.weight.zero_()
        self.gate.bias.fill_(-torch.inf)
        self.gate.bias[0] = 0.0


class ResidualFusion(nn.Module):
    """x + sum_i M_i W_o,i with W_o starting at zero, so that a new memory changes nothing at first.

    residual (the residual stream), memories: [b n d] -> [b n d].
    Source: "Memory-Augmented Transformer Implementation Plan" (docs/coverage.md).
    """

    parameter_group = "memory"

    def __init__(self, hidden_dim: int, num_memories: int, init_zero: bool = True) -> None:
        super().__init__()
        scale = 0.0 if init_zero else 1.0
        self.o_proj = nn.ModuleList(Linear(hidden_dim, hidden_dim, scale=scale) for _ in range(num_memories))

    def forward(self, residual: Tensor, memories: list[Tensor]) -> Tensor:
        for project, memory in zip(self.o_proj, memories, strict=True):
            residual = residual + project(memory)
        return residual

    @torch.no_grad()
    def close(self) -> None:
        """Shut the memories out: exactly the plain transformer until W_o is trained."""
        for weight in self.parameters():
            weight.zero_()
