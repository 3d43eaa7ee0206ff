"""Routers that select the chapters of a memory bank ("Core Package", docs/coverage.md).

Axes: b batch, n tokens, m earlier tokens of the same row, p tokens before the input, d hidden, c chapters,
r selected chapters, g decisions: one per row or one per token.

A router is a linear map of a summary vector; the routers differ in the summary:

| router | summary for token n | decisions |
| --- | --- | --- |
| `ChapterRouter` | the mean of all given tokens | 1 per row |
| `RollingRouter` | the mean of the last `window_size` tokens up to n | 1 per token |
| `TokenLevelRouter` | token n itself | 1 per token |
| `HybridRouter` | the mean of the earlier tokens' mean and the rolling mean | 1 per token |

`ChapterRouter` is **not causal** if it is called with the tokens that it then serves: a token's chapters
depend on later tokens. This is valid for a complete prompt, but not for training or scoring token by token.
In a stream the summary is that of the previous segment (`memlib.memory.chapters.memory`). The other routers
are causal.

With logits z = s W + b and p = softmax(z), the r chapters with the largest p are selected. Their weights
are p, normalised to sum to 1 for r > 1 (Mixtral). For r = 1 the weight is p itself (Switch); normalised, it
would have no gradient. Everything from the logits on is at least float32, because half precision changes
decisions (Switch, section 2.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.nn.batch_sum import BatchSum, own_rows
from memlib.nn.linear import Linear
from memlib.ops import rolling_mean

Losses = dict[str, Tensor]


class Choice(NamedTuple):
    """Selected chapters: indices, log_weights: [b g r], best first; logits: [b g c]."""

    indices: Tensor
    log_weights: Tensor
    logits: Tensor

    @property
    def weights(self) -> Tensor:
        return self.log_weights.exp()


@dataclass(frozen=True)
class RouterLossOptions:
    """Which losses a router has, with their coefficients; `router_losses` has the equations."""

    use_load_balance_loss: bool = True
    load_balance_coefficient: float = 0.01
    use_auxiliary_loss: bool = False
    auxiliary_loss_coefficient: float = 0.01
    use_z_loss: bool = False
    z_loss_coefficient: float = 0.001

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients of the enabled losses, by name."""
        named = {
            "load_balance": (self.use_load_balance_loss, self.load_balance_coefficient),
            "auxiliary": (self.use_auxiliary_loss, self.auxiliary_loss_coefficient),
            "z": (self.use_z_loss, self.z_loss_coefficient),
        }
        return {name: coefficient for name, (used, coefficient) in named.items() if used}


class ChapterRouter(nn.Module):
    """Select chapters once per sequence, from its mean: not causal, for complete prompts.

    router(hidden [b n d], attention_mask [b n]) -> (indices [b r], weights [b r], losses). losses: the
    enabled losses, each times its coefficient (`router_losses`); empty with return_losses=False. Raises
    ValueError unless 1 <= top_k <= num_chapters.
    """

    batch_sum: BatchSum = staticmethod(own_rows)

    def __init__(
        self,
        hidden_dim: int,
        num_chapters: int,
        top_k: int,
        losses: RouterLossOptions = RouterLossOptions(),
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_chapters:
            raise ValueError(f"top_k = {top_k}: must be 1 … num_chapters = {num_chapters}")
        self.num_chapters, self.top_k = num_chapters, top_k
        self.coefficients = losses.coefficients
        self.proj = Linear(hidden_dim, num_chapters, bias=True)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, return_losses: bool = True
    ) -> tuple[Tensor, Tensor, Losses]:
        mask = real(hidden, attention_mask)
        choice = self.choose(rearrange(masked_mean(hidden, mask), "b d -> b 1 d"))
        losses = self.losses(choice, rearrange(mask.any(1), "b -> b 1")) if return_losses else {}
        return choice.indices[:, 0], choice.weights[:, 0], losses

    def choose(self, summary: Tensor) -> Choice:
        """Select chapters from summaries [b g d]."""
        logits = self.proj(summary)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best, indices = torch.log_softmax(logits, -1).topk(self.top_k, -1)
        if self.top_k > 1:
            best = torch.log_softmax(best, -1)
        return Choice(indices, best, logits)

    def losses(self, choice: Choice, counts: Tensor) -> Losses:
        """The enabled losses times their coefficients; counts: [b g], mask of valid decisions."""
        if not self.coefficients:
            return {}
        all_three = router_losses(choice.logits, choice.indices, counts, self.batch_sum)
        return {name: coefficient * all_three[name] for name, coefficient in self.coefficients.items()}


class TokenLevelRouter(ChapterRouter):
    """Select chapters for each token from the token itself: -> (indices [b n r], weights [b n r], losses).

    "Core Package" uses it for generation only, where one token is read at a time.
    """

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, return_losses: bool = True
    ) -> tuple[Tensor, Tensor, Losses]:
        return self.each(hidden, real(hidden, attention_mask), return_losses)

    def each(self, summary: Tensor, mask: Tensor, return_losses: bool) -> tuple[Tensor, Tensor, Losses]:
        """Select chapters for each token from its summary [b n d]; mask: [b n], valid tokens."""
        choice = self.choose(summary)
        return choice.indices, choice.weights, self.losses(choice, mask) if return_losses else {}


class RollingRouter(TokenLevelRouter):
    """Select chapters for each token from the mean of the last `window_size` tokens up to it."""

    def __init__(
        self,
        hidden_dim: int,
        num_chapters: int,
        top_k: int,
        window_size: int = 64,
        losses: RouterLossOptions = RouterLossOptions(),
    ) -> None:
        super().__init__(hidden_dim, num_chapters, top_k, losses)
        self.window_size = window_size

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, return_losses: bool = True
    ) -> tuple[Tensor, Tensor, Losses]:
        mask = real(hidden, attention_mask)
        return self.each(rolling_mean(hidden, mask, self.window_size), mask, return_losses)


class HybridRouter(RollingRouter):
    """Select chapters for each token from (mean of earlier tokens + rolling mean) / 2.

    router(hidden [b n d], before [b p d]); without `before` it is a `RollingRouter`.
    """

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        return_losses: bool = True,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Losses]:
        mask = real(hidden, attention_mask)
        summary = rolling_mean(hidden, mask, self.window_size)
        if before is not None:
            summary = (summary + reduce(before, "b p d -> b 1 d", "mean")) / 2
        return self.each(summary, mask, return_losses)


def router_losses(
    logits: Tensor, indices: Tensor, counts: Tensor | None = None, batch_sum: BatchSum = own_rows
) -> Losses:
    """Auxiliary losses that balance the use of chapters and keep logits small, without coefficients.

    logits: [... c], indices: [... r]; counts: [...], mask of valid decisions (None: all); batch_sum: sums
    over the rows of all processes, so that the losses are the whole batch's. All losses are zero without a
    valid decision. f_c is the fraction of all selections that are chapter c, P_c the mean of
    p_c, C the number of chapters:

        load_balance = C sum_c f_c P_c              Switch, arXiv 2101.03961, eq. 4; C^2 times GShard's
                                                    mean_c f_c P_c, arXiv 2006.16668; 1 if even
        auxiliary    = C sum_c (P_c - 1/C)^2        the squared coefficient of variation of use:
                                                    Shazeer et al. 2017, arXiv 1701.06538
        z            = mean logsumexp(z)^2          ST-MoE, arXiv 2202.08906, eq. 5
    """
    c = logits.shape[-1]
    real = torch.ones_like(logits[..., 0]) if counts is None else counts.to(logits.dtype)
    valid = batch_sum(real.sum())
    weight = real / valid.clamp(min=1)  # of each decision in a mean
    chosen = reduce(F.one_hot(indices, c).to(logits.dtype), "... r c -> ... c", "mean")
    share = batch_sum(einsum(weight, chosen, "..., ... c -> c"))
    use = batch_sum(einsum(weight, torch.softmax(logits, -1), "..., ... c -> c"))
    any_counts = valid.clamp(max=1)  # 0 without a valid decision
    return {
        "load_balance": c * (share * use).sum(),
        "auxiliary": any_counts * c * (use - 1 / c).square().sum(),
        "z": batch_sum((weight * torch.logsumexp(logits, -1).square()).sum()),
    }


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the valid tokens, zero without any: [b n d], [b n] -> [b d]."""
    weight = mask.to(hidden.dtype)
    total = reduce(hidden * rearrange(weight, "b n -> b n 1"), "b n d -> b d", "sum")
    return total / rearrange(weight.sum(1).clamp(min=1), "b -> b 1")


def real(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as booleans, all true if None: [b n]."""
    return torch.ones_like(hidden[..., 0], dtype=torch.bool) if mask is None else mask.bool()
