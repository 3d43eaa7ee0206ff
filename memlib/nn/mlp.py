"""The feed-forward network of a block."""

from __future__ import annotations

from torch import Tensor, nn

from memlib.nn.linear import Linear
from memlib.ops import silu_mul


class MLP(nn.Module):
    """SwiGLU: y = (silu(x W_gate) * x W_up) W_down.  hidden: [b n d] -> [b n d].

    out_scale: of W_down's start, 1 / sqrt(2 layers) in a model, 0 for a branch that starts shut.
    Source: Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, hidden_dim: int, intermediate_dim: int, out_scale: float = 1.0) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_dim, intermediate_dim)
        self.up_proj = Linear(hidden_dim, intermediate_dim)
        self.down_proj = Linear(intermediate_dim, hidden_dim, scale=out_scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(hidden), self.up_proj(hidden)))
