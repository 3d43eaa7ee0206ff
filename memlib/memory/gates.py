"""Gates: the small learned valves of the house.

Every gate is a `Gate` or a `HeadGate`, so that training can give gates their own learning rate and no
weight decay (gates that share the weights' rate tend not to move; see docs/design.md).
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn

from memlib.nn.probe import Probe


class Gate(nn.Linear):
    """The linear map under a gate: logits = x W + b. W starts at zero, so a gate opens by its bias."""

    def __init__(self, in_features: int, out_features: int, bias: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, bias)


class HeadGate(nn.Module):
    """One logit b_h for each head, the same for all tokens: [h]."""

    def __init__(self, num_heads: int, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((num_heads,), bias))


class RetrievalGate(nn.Module):
    """g_retrieve, the hybrid's learned gate: how much of what is retrieved a token takes, sigma(g).

    per: "layer", one number g; or "query", g_t = h_t w + b for each token, with w starting at zero: both
    start with every token at sigma(init).  hidden: [b n d] -> sigma(g): [b n].
    Source: "Architecture Diagrams", Learnable Retrieval Gate (spec A4); the gate per query is ours.
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


class SoftmaxFusion(nn.Module):
    """The gating network: H = g[0] A + g[1] M_1 + g[2] M_2 + …,  g = softmax(h W_g + b_g) per token.

    hidden, attended: [b n d]; memories: list of [b n d] -> [b n d].
    Source: "Architecture Diagrams", Memory Fusion Equation (spec A2, A4).
    """

    def __init__(self, hidden_dim: int, num_memories: int) -> None:
        super().__init__()
        self.gate = Gate(hidden_dim, 1 + num_memories)
        self.weight_probe = Probe("batch token source")

    def forward(self, hidden: Tensor, attended: Tensor, memories: list[Tensor]) -> Tensor:
        weight = self.weight_probe(torch.softmax(self.gate(hidden), -1))
        sources = torch.stack((attended, *memories), -2)
        return einsum(weight, sources, "b n m, b n m d -> b n d")

    @torch.no_grad()
    def close(self) -> None:
        """Shut the memories out for good: g = (1, 0, …), exactly the plain transformer."""
        self.gate.weight.zero_()
        self.gate.bias.fill_(-torch.inf)
        self.gate.bias[0] = 0.0


class ResidualFusion(nn.Module):
    """x + sum_i M_i W_o,i with W_o starting at zero, so that a new memory changes nothing at first.

    hidden (the residual stream), memories: [b n d] -> [b n d]. Source: "Implementation Plan" (spec D3).
    """

    def __init__(self, hidden_dim: int, num_memories: int, init_zero: bool = True) -> None:
        super().__init__()
        self.o_proj = nn.ModuleList(
            nn.Linear(hidden_dim, hidden_dim, bias=False) for _ in range(num_memories)
        )
        if init_zero:
            self.close()

    def forward(self, stream: Tensor, memories: list[Tensor]) -> Tensor:
        for project, memory in zip(self.o_proj, memories, strict=True):
            stream = stream + project(memory)
        return stream

    @torch.no_grad()
    def close(self) -> None:
        """Shut the memories out: exactly the plain transformer until W_o is trained."""
        for weight in self.parameters():
            weight.zero_()


def gated_write(slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """M_s <- (1 - erase_ts) M_s + strength_ts values_t for t = 1 … n, without a loop over tokens.

    After the last token, what token t wrote has been thinned by every later erase:
        M_s' = prod_u (1 - erase_us) M_s + sum_t strength_ts prod_{u>t} (1 - erase_us) values_t
    slots: [b s e], strength, erase: [b n s], values: [b n e] -> [b s e].
    """
    log_remain = torch.log1p(-erase.clamp(max=1 - 1e-6))
    total = reduce(log_remain, "b n s -> b 1 s", "sum")
    later = torch.exp(total - torch.cumsum(log_remain, 1))
    kept = slots * rearrange(torch.exp(total), "b 1 s -> b s 1")
    return kept + einsum(strength * later, values, "b n s, b n e -> b s e")


def identity_slots(num_slots: int, dim: int) -> Tensor:
    """Identity-style rows for any number of slots and width: [s d], unit rows.

    The first d rows are the identity's; more slots than that go on with the rows of fixed random
    rotations, orthonormal among themselves, so that no two slots start equal. LM2 starts its memory at
    the identity and therefore needs slots = width; this is the same start without the restriction.
    """
    eye = torch.eye(dim)
    if num_slots <= dim:
        return eye[:num_slots]
    generator = torch.Generator().manual_seed(0)
    rounds = [eye]
    for _ in range((num_slots - 1) // dim):
        square = torch.randn(dim, dim, generator=generator)
        rounds.append(torch.linalg.qr(square).Q)
    return rearrange(torch.stack(rounds), "r s d -> (r s) d")[:num_slots]
