"""Facts written by a call: the subject's hidden states are keys, and each fact has one value.

    q_t = unit((mean of the last w hidden states up to t  -  c) R)
    s_i = sharpness (max_p q_t . k_ip - threshold)
    y_t = sum_i e^{s_i} v_i / (1 + sum_j e^{s_j})              the 1 is the null slot

A text that names no subject reads the null slot, which is zero: it is left as it was. The mean over w tokens
holds the whole of a name; the hidden state of its last token alone confuses people of one family name. c is
the mean of the keys, and R whitens what differs between sentences about one subject: R R^T = (S + e I)^-1,
S their covariance. Both are made anew when facts are written. A fact has several keys, one for each sentence
in which its subject was shown.

`write_facts` stores keys; the values start at zero and are the only parameters. `forget_facts` frees places.
The stream writes nothing: the state is only the last w - 1 tokens, which a mean may still need.

Sources: Meng et al. 2022, arXiv 2202.05262 (subject keys) and 2210.07229 (covariance of keys).

Axes: b batch, n tokens, w window, d hidden, f facts, p keys of a fact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import FactsMemoryConfig
from memlib.memory.base import Memory, State, axes, zeros
from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import unit
from memlib.ops import newest_tokens, rolling_mean


@dataclass(frozen=True)
class FactState(State):
    """recent: [b w-1 d], the newest tokens, and mask, which of them exist; of the open segment too."""

    recent: Tensor = axes("batch token feature")
    mask: Tensor = axes("batch token")


class FactMemory(Memory):
    """A table of facts, read where a text names their subjects."""

    shares_state = False
    config: FactsMemoryConfig
    keys: Tensor
    shown: Tensor
    used: Tensor
    center: Tensor
    whiten: Tensor

    def __init__(self, config: FactsMemoryConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.starts_silent = config.start == "empty"
        f, p = config.num_facts, config.keys_per_fact
        self.values = nn.Parameter(torch.empty(f, hidden_dim))
        self.register_buffer("keys", torch.empty(f, p, hidden_dim))  # whitened, of length 1
        self.register_buffer("shown", torch.empty(f, p, hidden_dim))  # as they were written
        self.register_buffer("used", torch.empty(f, p, dtype=torch.bool))
        self.register_buffer("center", torch.empty(hidden_dim))
        self.register_buffer("whiten", torch.empty(hidden_dim, hidden_dim))
        self.weight_point = HookPoint("weight", "batch token slot")
        self.mean_point = HookPoint("mean", "batch token feature")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        random = self.config.start == "random"
        for tensor in (self.values, self.keys):
            nn.init.normal_(tensor) if random else nn.init.zeros_(tensor)
        self.keys.copy_(unit(self.keys))
        self.used.fill_(random)
        self.shown.copy_(self.keys)
        self.center.zero_()
        nn.init.eye_(self.whiten)

    # ------------------------------------------------------------------------------------- the contract

    def init_state(self, batch_size: int) -> FactState:
        before = self.config.window - 1
        return FactState(
            zeros(self, batch_size, before, self.hidden_dim),
            zeros(self, batch_size, before, dtype=torch.bool),
        )

    def with_open_segment(self, state: FactState, hidden: Tensor, mask: Tensor) -> FactState:
        return replace(
            state, recent=torch.cat((state.recent, hidden), 1), mask=torch.cat((state.mask, mask), 1)
        )

    def read(self, hidden: Tensor, state: FactState) -> Tensor:
        weight = self.weights(self.mean(hidden, state))
        self.weight_point(weight)
        return einsum(weight, self.values.to(weight.dtype), "b n f, f d -> b n d")

    def write(self, hidden: Tensor, state: FactState, mask: Tensor) -> FactState:
        tokens = torch.cat((state.recent, hidden.to(state.recent.dtype)), 1)
        return FactState(*newest_tokens(tokens, torch.cat((state.mask, mask), 1), self.config.window - 1))

    # ---------------------------------------------------------------------------------------- the facts

    def mean(self, hidden: Tensor, state: FactState) -> Tensor:
        """The mean of the last w tokens up to each: what a key is made of; hidden: [b n d] -> [b n d]."""
        tokens = torch.cat((state.recent, hidden), 1)
        mask = F.pad(state.mask, (0, tokens.shape[1] - state.mask.shape[1]), value=True)
        mean = rolling_mean(tokens, mask, self.config.window, hidden.shape[1])
        self.mean_point(mean)
        return mean

    def key(self, mean: Tensor) -> Tensor:
        """unit((mean - c) R): [... d] -> [... d]."""
        return unit((mean - self.center.to(mean.dtype)) @ self.whiten.to(mean.dtype))

    def weights(self, mean: Tensor) -> Tensor:
        """e^{s_i} / (1 + sum_j e^{s_j}) for each token and fact: [b n d] -> [b n f]."""
        cosine = einsum(self.key(mean), self.keys.to(mean.dtype), "b n d, f p d -> b n f p")
        score = self.config.sharpness * (cosine - self.config.threshold)
        score = reduce(score.masked_fill(~self.used, -torch.inf), "b n f p -> b n f", "max")
        with_null = F.pad(score, (1, 0))  # the null slot's score is 0
        return torch.softmax(with_null, -1)[..., 1:]

    @torch.no_grad()
    def write_facts(self, means: Tensor) -> Tensor:
        """Store facts by what `mean` gave where their subjects end: [f p d] -> [f], their places.

        Their values start at zero. Raises ValueError where too few places are free or p is not
        keys_per_fact.
        """
        free = (~self.used.any(1)).nonzero()[:, 0]
        if len(means) > len(free):
            raise ValueError(
                f"{len(means)} facts for {len(free)} free places: forget some or raise "
                f"memory.facts.num_facts = {self.config.num_facts}"
            )
        if means.shape[1:] != self.shown.shape[1:]:
            raise ValueError(
                f"keys of shape {list(means.shape[1:])}: expected {list(self.shown.shape[1:])}, one for each "
                "of memory.facts.keys_per_fact sentences"
            )
        places = free[: len(means)]
        self.shown[places] = means.to(self.shown.dtype)
        self.used[places] = True
        self.values[places] = 0.0
        self.refresh()
        return places

    @torch.no_grad()
    def forget_facts(self, places: Tensor) -> None:
        """Free the places of some facts; the keys of all others stay as they are."""
        self.used[places] = False
        for tensor in (self.values, self.keys, self.shown):
            tensor[places] = 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        """Make c, R and all keys anew from the sentences shown."""
        known = self.shown[self.used.any(1)].double()
        spread = known - reduce(known, "f p d -> f 1 d", "mean")
        covariance = einsum(spread, spread, "f p d, f p e -> d e") / max(1, known.shape[0] * known.shape[1])
        size = covariance.diagonal().mean()
        if size > 0:  # with one key a fact nothing is known of the spread
            ridge = self.config.shrinkage * size * torch.eye(self.hidden_dim, device=size.device).double()
            self.whiten.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance + ridge)))
        self.center.copy_(reduce(known, "f p d -> d", "mean"))
        keys = self.key(rearrange(self.shown, "f p d -> (f p) d"))
        self.keys.copy_(rearrange(keys, "(f p) d -> f p d", p=self.config.keys_per_fact))
