"""The hybrid's learned gate: the weight of retrieved values for each token, and whether to search at all.

Axes: b batch, n tokens, d hidden.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from memlib.memory.gates import Gate, HeadGate


class RetrievalGate(nn.Module):
    """g_retrieve, the hybrid's learned gate: the weight sigma(g) of retrieved values.

    per: "layer", one number g; or "query", g_t = h_t w + b for each token, with w starting at zero: both
    start at sigma(init) for every token.  hidden: [b n d] -> sigma(g): [b n].
    Source: "Architecture Diagrams", Learnable Retrieval Gate (docs/coverage.md); the gate per query is ours.
    """

    def __init__(self, hidden_dim: int, per: str, init: float, exploration: float = 0.0) -> None:
        super().__init__()
        self.exploration = exploration
        self.layer = HeadGate(1, init) if per == "layer" else None
        self.query = Gate(hidden_dim, 1, init) if per == "query" else None

    def forward(self, hidden: Tensor) -> Tensor:
        logit = self.logit(hidden)
        if self.training and self.exploration:
            logit = logit + self.exploration * torch.logit(torch.rand_like(logit), 1e-6)
        return torch.sigmoid(logit)

    def logit(self, hidden: Tensor) -> Tensor:
        """g for each token, without noise: [b n]."""
        if self.query is not None:
            return rearrange(self.query(hidden), "b n 1 -> b n")
        assert self.layer is not None
        return repeat(self.layer.bias, "1 -> b n", b=hidden.shape[0], n=hidden.shape[1])
