"""External memory: past tokens' key-value pairs, of which each token retrieves the k most similar.

Axes: b batch, n tokens of a segment, h heads, k head width, j hits that came back for a query, d hidden.

After LongMem (Wang et al. 2023, arXiv 2306.07174) and Memorizing Transformers (Wu et al. 2022, arXiv
2203.08913), spec A3. What differs, and why:

- **Keys have no position.** Neither rotary angles nor distances enter a key, so a pair is found as well
  after sixty segments as after one. The price: of two equal keys, nothing in them says which is the
  later one. `newest_within` says it by a rule: of equally good hits only the newest counts.
- **One address for asking and filing**, and a value is filed under the token before it (token shift):
  from the first step on, a key that comes up again finds what followed it. In the papers queries and
  keys have their own projections, and no gradient reaches a stored key; docs/diary.md measures both.
- **Stored pairs stay in the graph** for as long as training's `horizon` reaches. The papers detach
  always; `horizon: 1` is that.
- **Every stream has its own memory** (LongMem's code has one for all rows of a batch).

The pairs are kept in the state, bounded and exactly searched, or in a `Store` that is attached
(shelves.py); what is asked and filed is the same.

With `retrieval_gate` it is the hybrid's M_ext (spec A4): in training sigma(g) M, at inference a token whose
sigma(g) is at most `retrieval_threshold` is not searched for at all and takes nothing.

Scores are `sharpness_h * cos(query, key)`, so that old keys keep their scale while the encoder moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import ExternalMemoryConfig
from memlib.memory.base import Memory, State
from memlib.memory.gates import HeadGate, RetrievalGate
from memlib.memory.shelves import Filing, Found, Shelf, StoreShelf, TensorShelf
from memlib.memory.store import Store
from memlib.memory.stream import Shape
from memlib.nn.probe import Probe


@dataclass(frozen=True)
class Asked:
    """The retrieval gate's word on each token: gate = sigma(g), whether it is searched for, and the share
    of what comes back that it takes: [b n] each."""

    gate: Tensor
    search: Tensor
    share: Tensor


@dataclass(frozen=True)
class Recalled:
    """What came back for each query: score, serial: [b h n j]; values: [b h n j k].

    A hit that does not exist (an empty memory, a search that was not made) has serial -1 and the lowest
    score there is. asked: who was searched for, None without a retrieval gate.
    """

    score: Tensor
    serial: Tensor
    values: Tensor
    asked: Asked | None = None

    @property
    def weight(self) -> Tensor:
        """softmax over the hits; zero, not uniform, where there are none: [b h n j]."""
        return torch.softmax(self.score, -1) * (self.serial >= 0)

    @property
    def mean(self) -> Tensor:
        """The hits' values by their weights, unshared: [b h n k]."""
        return einsum(self.weight, self.values, "b h n j, b h n j k -> b h n k")


class ExternalMemory(Memory):
    """Tokens of past segments as key-value pairs; reads by attention over the k nearest (spec A3).

    `join` says how what came back meets the window's own attention A (M is the memory's softmax):

        fusion   M goes to the block's gating network, as the diagrams have it
        heads    (1 - g_h) A + g_h M,  g_h = sigma(b_h)                          LongMem, Memorizing Tr.
        joint    one softmax over window and hits together; b_h shifts the hits  memorizing-tr.-pytorch
    """

    def __init__(self, config: ExternalMemoryConfig, hidden_dim: int) -> None:
        super().__init__()
        self.config = config
        h = config.num_heads
        self.query_address = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.key_address = (
            self.query_address if config.shared_address else nn.Linear(hidden_dim, hidden_dim, bias=False)
        )
        self.shift = nn.Parameter(torch.full((hidden_dim,), config.shift_init))
        self.sharpness = nn.Parameter(torch.full((h,), config.sharpness))
        self.v_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.shelf: Shelf = TensorShelf(config)
        self.in_attention = config.join != "fusion"
        if self.in_attention:
            self.gate = HeadGate(h, config.gate_init)
            self.gate_probe = Probe("batch head token")
        else:
            self.o_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.retrieval: RetrievalGate | None = None
        if config.retrieval_gate != "none":
            self.retrieval = RetrievalGate(
                hidden_dim, config.retrieval_gate, config.retrieval_gate_init, config.exploration
            )
            self.retrieval_probe = Probe("batch token")
            self.search_probe = Probe("batch token")
        self.weight_probe = Probe("batch head token hit")
        self.score_probe = Probe("batch head token hit")
        self.source_probe = Probe("batch head token hit")

    def attach(self, store: Store | None) -> None:
        """Keep what is filed in a store from here on; None: in the state, as a model begins.

        States of before can then not be read. Raises ValueError for a store of other sizes.
        """
        if store is None:
            self.shelf = TensorShelf(self.config)
            return
        wanted = shape_for(self.config, self.v_proj.weight.shape[0], store.shape.dtype)
        if store.shape != wanted:
            raise ValueError(
                f"the store is of {store.shape}, this memory of {wanted}: open the one made for it"
            )
        self.shelf = StoreShelf(self.config, store)

    def init_state(self, batch_size: int) -> State:
        return self.shelf.init_state(batch_size, self.v_proj.weight)

    def read(self, hidden: Tensor, state: Any) -> Tensor:
        """join: fusion. y = share (softmax(score) V) W_o over a token's hits; hidden: [b n d] -> [b n d]."""
        found = self.probed(self.recall(hidden, state))
        said = self.o_proj(rearrange(found.mean, "b h n k -> b n (h k)"))
        return said if found.asked is None else said * rearrange(found.asked.share, "b n -> b n 1")

    def mix(self, hidden: Tensor, attended: Tensor, logsumexp: Callable[[], Tensor], state: Any) -> Tensor:
        """join: heads, joint. (1 - w) A + w M by head; attended: [b h n k], logsumexp: -> [b h n].

        The joint softmax is the same mixture: M's share of the sum of both, w = sigma(lse(hits) + b_h -
        lse(window)). A token for which nothing came back keeps its window's attention as it is. w is then
        multiplied by the share.
        """
        found = self.probed(self.recall(hidden, state))
        logit: Tensor = rearrange(self.gate.bias, "h -> h 1")
        if self.config.join == "joint":
            logit = torch.logsumexp(found.score, -1) + logit - logsumexp()
        weight = self.gate_probe(torch.sigmoid(logit) * (found.serial >= 0).any(-1))
        if found.asked is not None:
            weight = weight * rearrange(found.asked.share, "b n -> b 1 n")
        return torch.lerp(attended, found.mean, rearrange(weight, "b h n -> b h n 1"))

    def close(self) -> None:
        """Shut the memory out of the attention for good."""
        nn.init.constant_(self.gate.bias, -torch.inf)

    def address(self, proj: nn.Linear, features: Tensor) -> Tensor:
        """Unit vectors by head; features: [b n d] -> [b h n k]."""
        return F.normalize(rearrange(proj(features), "b n (h k) -> b h n k", h=self.config.num_heads), dim=-1)

    def recall(self, hidden: Tensor, state: Any) -> Recalled:
        """The top_k pairs nearest to each token's query; hidden: [b n d]."""
        asked = self.asks(hidden)
        return replace(self.scored(self.find(hidden, state, asked)), asked=asked)

    def asks(self, hidden: Tensor) -> Asked | None:
        """Who is searched for; hidden: [b n d]. None: all, and they take all that comes back.

        Training searches for all, so that every gate hears what retrieval would have been worth.
        """
        if self.retrieval is None:
            return None
        gate = self.retrieval(hidden)
        if self.training:
            return Asked(gate, torch.ones_like(gate, dtype=torch.bool), gate)
        search = gate > self.config.retrieval_threshold
        return Asked(gate, search, gate * search if self.config.retrieval_weighted else search.to(gate.dtype))

    def losses(self, hidden: Tensor, state: Any, mask: Tensor) -> dict[str, Tensor]:
        """retrieval_cost x mean sigma(g): gates then open where retrieval is worth that much."""
        if self.retrieval is None or not self.config.retrieval_cost:
            return {}
        gate = torch.sigmoid(self.retrieval.logit(hidden))
        return {"retrieval": self.config.retrieval_cost * gate[mask].mean()}

    def find(self, hidden: Tensor, state: Any, asked: Asked | None = None) -> Found:
        """The top_k pairs nearest to each token that asks; for the others nothing is computed."""
        if not isinstance(state, self.shelf.state):
            raise ValueError(
                f"memory_state holds {type(state).__name__}, this memory now takes "
                f"{self.shelf.state.__name__}: start from None after attaching or detaching a store"
            )
        if asked is None or bool(asked.search.all()):
            return self.shelf.find(self.address(self.query_address, hidden), state)
        most = int(asked.search.sum(1).max())
        if not most:
            like = rearrange(hidden, "b n (h k) -> b h n k", h=self.config.num_heads)
            return Found.nothing(like, self.config.top_k)
        first = packed(hidden, asked.search)[0][:, :most]
        return self.shelf.find(self.address(self.query_address, first), state).spread(asked.search)

    def scored(self, found: Found) -> Recalled:
        """Cosines as scores, each head with its own sharpness."""
        score = rearrange(self.sharpness, "h -> h 1 1") * found.cosine
        lowest = torch.finfo(score.dtype).min / 2  # finite: an empty memory must not give NaN
        score = score.masked_fill(found.serial < 0, lowest)
        if self.config.newest_within is not None:
            score = score.masked_fill(outdated(score, found.serial, self.config.newest_within), lowest)
        return Recalled(score, found.serial, found.values)

    def probed(self, found: Recalled) -> Recalled:
        """For recordings: which past token of the stream came back, its score, its weight."""
        self.score_probe(found.score.masked_fill(found.serial < 0, -torch.inf))
        self.source_probe(found.serial)
        self.weight_probe(found.weight)
        if found.asked is not None:
            self.retrieval_probe(found.asked.gate)
            self.search_probe(found.asked.search)
        return found

    def write(self, hidden: Tensor, state: Any, mask: Tensor) -> State:
        hidden, valid = packed(hidden, mask)
        before = torch.cat((rearrange(state.last, "b d -> b 1 d"), hidden), 1)
        newest = repeat(valid.sum(1), "b -> b 1 d", d=hidden.shape[-1])
        new = Filing(
            keys=self.address(self.key_address, torch.lerp(hidden, before[:, :-1], self.shift)),
            values=rearrange(self.v_proj(hidden), "b n (h k) -> b h n k", h=self.config.num_heads),
            valid=valid,
            last=rearrange(before.gather(1, newest), "b 1 d -> b d"),
        )
        return self.shelf.file(new, state, partial(self.came_back, hidden, state, valid))

    @torch.no_grad()
    def came_back(self, hidden: Tensor, state: Any, valid: Tensor) -> tuple[Found, Tensor]:
        """What a segment's tokens were given, and with which weights [b h n j]: eviction may ask."""
        found = self.find(hidden, state, self.asks(hidden))
        return found, self.scored(found).weight * rearrange(valid, "b n -> b 1 n 1")


def outdated(score: Tensor, serial: Tensor, slack: float) -> Tensor:
    """Which hits score within slack of their query's best and are not the newest of those: [b h n j].

    Keys without positions cannot say which of two equal ones is the later; their serials can.
    """
    equal = (serial >= 0) & (score >= reduce(score, "b h n j -> b h n 1", "max") - slack)
    newest = reduce(torch.where(equal, serial, -1), "b h n j -> b h n 1", "max")
    return equal & (serial < newest)


def shape_for(config: ExternalMemoryConfig, hidden_dim: int, dtype: str = "float32") -> Shape:
    """The shape of a store for a memory of this configuration."""
    h, k = config.num_heads, hidden_dim // config.num_heads
    return Shape(h, k, k, config.capacity, config.eviction, config.chunk, dtype)


def packed(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A segment's tokens with the ones that count first, in order; and which those are: [b n d], [b n]."""
    if bool(mask.all()):
        return hidden, mask
    order = torch.argsort((~mask).byte(), dim=1, stable=True)
    valid = mask.gather(1, order)
    hidden = hidden.gather(1, repeat(order, "b n -> b n d", d=hidden.shape[-1]))
    return hidden * rearrange(valid, "b n -> b n 1"), valid
