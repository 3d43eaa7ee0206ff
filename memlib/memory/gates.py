"""Learned gates.

Every gate is a `Gate` or a `HeadGate`, so that training can give gates their own learning rate and no
weight decay (gates that share the weights' rate tend not to move; see docs/design.md).

Axes: b batch, n tokens, d hidden, h heads, o outputs of a gate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.ops import shifted


class Gate(nn.Linear):
    """The linear map under a gate: logits = x W + b. W starts at zero, so a gate opens by its bias."""

    parameter_group = "gates"

    def __init__(self, in_features: int, out_features: int, bias: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        self.initial_bias = bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not hasattr(self, "initial_bias"):  # called by nn.Linear's constructor
            super().reset_parameters()
            return
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)


def gates_of_pairs(hidden: Tensor, gates: Sequence[Gate]) -> list[Tensor]:
    """Logits of gates on [x_t, x_{t-1}], in one product and without building the pairs.

    hidden: [b n d]; gates with 2 d input features -> [b n out] of each.
    """
    sizes = [gate.out_features for gate in gates]
    weight = rearrange(torch.cat([gate.weight for gate in gates]), "o (two d) -> (two o) d", two=2)
    bias = torch.cat([gate.bias for gate in gates])
    now, before = F.linear(hidden, weight).chunk(2, -1)
    return list((now + shifted(before) + bias.to(now.dtype)).split(sizes, -1))


class HeadGate(nn.Module):
    """One logit b_h for each head, the same for all tokens: [h]."""

    parameter_group = "gates"

    def __init__(self, num_heads: int, bias: float = 0.0) -> None:
        super().__init__()
        self.initial_bias = bias
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.bias, self.initial_bias)
