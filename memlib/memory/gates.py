"""Learned gates.

Every gate is a `Gate` or a `HeadGate`, so that training can give gates their own learning rate and no
weight decay (gates that share the weights' rate tend not to move; see docs/design.md).
"""

from __future__ import annotations

import torch
from torch import nn


class Gate(nn.Linear):
    """The linear map under a gate: logits = x W + b. W starts at zero, so a gate opens by its bias."""

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


class HeadGate(nn.Module):
    """One logit b_h for each head, the same for all tokens: [h]."""

    def __init__(self, num_heads: int, bias: float = 0.0) -> None:
        super().__init__()
        self.initial_bias = bias
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.bias, self.initial_bias)
