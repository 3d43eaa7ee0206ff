"""External memory: past tokens' key-value pairs, of which each token retrieves the k most similar.

Axes: b batch, n tokens of a segment, h heads, k head width, j hits of a query, d hidden.

After LongMem (Wang et al. 2023, arXiv 2306.07174) and Memorizing Transformers (Wu et al. 2022, arXiv
2203.08913). What differs, and why:

- **Keys have no position.** Neither rotary angles nor distances enter a key, so a pair is found as well
  after sixty segments as after one. The price: of two equal keys, nothing in them says which is the
  later one. `newest_within` says it by a rule: of equally good hits only the newest counts.
- **One projection for queries and keys**, and the key of a value is made from the token before it (token
  shift): from the first step on, a token that comes up again retrieves what followed it. In the papers
  queries and keys have their own projections, and no gradient reaches a stored key; docs/diary.md
  measures both.
- **Stored pairs stay in the graph** for as long as training's `horizon` reaches. The papers detach
  always; `horizon: 1` is that.
- **Every stream has its own memory** (LongMem's code has one for all rows of a batch).

The pairs are kept in the state, bounded and exactly searched, or in a `Store` that is attached
(backends.py); queries, keys and values are the same.

With `retrieval_gate` it is the hybrid's M_ext: in training sigma(g) M; at inference a token with sigma(g) at
most `retrieval_threshold` triggers no search and takes nothing.

Scores are `sharpness_h * cos(query, key)`, so that old keys keep their scale while the encoder moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from memlib.config import ExternalMemoryConfig
from memlib.memory.base import AttentionHeads, Memory, State
from memlib.memory.external.backends import Hits, KVBackend, NewPairs, StateBackend, StoreBackend
from memlib.memory.external.columns import Shape
from memlib.memory.external.retrieval_gate import RetrievalGate
from memlib.memory.external.store import Store
from memlib.memory.gates import HeadGate
from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import Linear, unit
from memlib.ops import merge_weight, take_rows, token_shift


@dataclass(frozen=True)
class Decision:
    """Per-token decision of the retrieval gate: gate = sigma(g), whether the token triggers a search, and
    the share of the hits that it takes: [b n] each."""

    gate: Tensor
    search: Tensor
    share: Tensor


class ExternalMemory(Memory):
    """Tokens of past segments as key-value pairs; reads by attention over the k nearest.

    `join` says how the hits meet the window's own attention A (M is the memory's softmax):

        fusion   M goes to the block's gating network, as in "Architecture Diagrams"
        heads    (1 - g_h) A + g_h M,  g_h = sigma(b_h)                          LongMem, Memorizing Tr.
        joint    one softmax over window and hits together; b_h shifts the hits  memorizing-tr.-pytorch
    """

    config: ExternalMemoryConfig

    def __init__(self, config: ExternalMemoryConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        h = config.num_heads
        self.query_address = Linear(hidden_dim, hidden_dim)
        self.key_address = self.query_address if config.shared_address else Linear(hidden_dim, hidden_dim)
        self.shift = nn.Parameter(torch.empty(hidden_dim))
        self.sharpness = nn.Parameter(torch.empty(h))
        self.v_proj = Linear(hidden_dim, hidden_dim)
        self.backend: KVBackend = StateBackend(config)
        self.uses_logsumexp = config.join == "joint"
        if self.in_attention:
            self.gate = HeadGate(h, config.gate_init)
            self.gate_point = HookPoint("gate", "batch head token")
        else:
            self.o_proj = Linear(hidden_dim, hidden_dim)
        self.retrieval: RetrievalGate | None = None
        if config.retrieval_gate != "none":
            self.retrieval = RetrievalGate(
                hidden_dim, config.retrieval_gate, config.retrieval_gate_init, config.exploration
            )
            self.retrieval_point = HookPoint("retrieval", "batch token")
            self.search_point = HookPoint("search", "batch token")
        self.weight_point = HookPoint("weight", "batch head token hit")
        self.score_point = HookPoint("score", "batch head token hit")
        self.source_point = HookPoint("source", "batch head token hit")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.shift, self.config.shift_init)
        nn.init.constant_(self.sharpness, self.config.sharpness)

    def attach(self, store: Store | None) -> None:
        """Keep new pairs in a store from here on; None: in the state, as a model begins.

        States of before can then not be read. Raises ValueError for a store of other sizes.
        """
        if store is None:
            self.backend = StateBackend(self.config)
            return
        wanted = shape_for(self.config, self.hidden_dim, store.shape.dtype)
        if store.shape != wanted:
            raise ValueError(
                f"the store is of {store.shape}, this memory of {wanted}: open the one made for it"
            )
        self.backend = StoreBackend(self.config, store)

    def init_state(self, batch_size: int) -> State:
        return self.backend.init_state(self, batch_size, self.hidden_dim)

    def check_state(self, state: object, name: str) -> None:
        if not isinstance(state, self.backend.state):
            raise ValueError(
                f"{name} is a {type(state).__name__}: this memory now takes "
                f"{self.backend.state.__name__}; start from None after attaching or detaching a store"
            )
        if isinstance(self.backend, StateBackend):  # beginning a state in a store would begin a stream
            super().check_state(state, name)

    # --------------------------------------------------------------------------------------- reading

    def read(self, hidden: Tensor, state: Any) -> Tensor:
        """join: fusion. y = share (softmax(score) V) W_o over a token's hits; hidden: [b n d] -> [b n d]."""
        hits, decision = self.retrieve(hidden, state)
        read = self.o_proj(rearrange(hits.mean, "b h n k -> b n (h k)"))
        return read if decision is None else read * rearrange(decision.share, "b n -> b n 1")

    def mix(self, heads: AttentionHeads, state: Any) -> Tensor:
        """join: heads, joint. (1 - w) A + w M by head: [b h n k].

        The joint softmax is the same mixture: M's share of the sum of both, w = sigma(lse(hits) + b_h -
        lse(window)). A token without hits keeps its window's attention as it is. w is then multiplied by
        the retrieval gate's share.
        """
        hits, decision = self.retrieve(heads.hidden, state)
        logit: Tensor = rearrange(self.gate.bias, "h -> h 1")
        if self.config.join == "joint":
            assert heads.logsumexp is not None, "join: joint needs the window's log-sum-exp (uses_logsumexp)"
            weight = merge_weight(heads.logsumexp, torch.logsumexp(hits.score, -1), logit)
        else:
            weight = torch.sigmoid(logit)
        weight = weight * hits.exist.any(-1)
        self.gate_point(weight)
        if decision is not None:
            weight = weight * rearrange(decision.share, "b n -> b 1 n")
        weight = rearrange(weight, "b h n -> b h n 1").to(heads.attended.dtype)
        return torch.lerp(heads.attended, hits.mean.to(heads.attended.dtype), weight)

    def close(self) -> None:
        """Shut the memory out of the attention for good."""
        nn.init.constant_(self.gate.bias, -torch.inf)

    def retrieve(self, hidden: Tensor, state: Any) -> tuple[Hits, Decision | None]:
        """The top_k pairs nearest to each token's query, with scores; hidden: [b n d]."""
        decision = self.decide(hidden)
        hits = self.scored(self.search(hidden, state, decision))
        self.score_point(lambda: hits.score.masked_fill(~hits.exist, -torch.inf))
        self.source_point(hits.serial)
        self.weight_point(lambda: hits.weight)
        if decision is not None:
            self.retrieval_point(decision.gate)
            self.search_point(decision.search)
        return hits, decision

    def decide(self, hidden: Tensor) -> Decision | None:
        """Tokens that trigger a search; None means every token, unweighted.  hidden: [b n d].

        Training searches for every token, so that each gate learns what retrieval would have been worth.
        """
        if self.retrieval is None:
            return None
        gate = self.retrieval(hidden)
        if self.training:
            return Decision(gate, torch.ones_like(gate, dtype=torch.bool), gate)
        search = gate > self.config.retrieval_threshold
        share = gate * search if self.config.retrieval_weighted else search.to(gate.dtype)
        return Decision(gate, search, share)

    def search(self, hidden: Tensor, state: Any, decision: Decision | None = None) -> Hits:
        """The top_k pairs nearest to each token that triggers a search; for the others nothing is computed.

        In a graph that is compiled every token is searched for, and the others' hits are dropped.
        """
        if decision is None or (self.training or torch.compiler.is_compiling()):
            hits = self.backend.search(self.address(self.query_address, hidden), state)
            if decision is None or self.training:
                return hits
            silent = ~rearrange(decision.search, "b n -> b 1 n 1")
            return replace(hits, serial=hits.serial.masked_fill(silent, -1))
        most = int(decision.search.sum(1).max())
        if most == hidden.shape[1] and bool(decision.search.all()):
            return self.backend.search(self.address(self.query_address, hidden), state)
        if not most:
            like = rearrange(hidden, "b n (h k) -> b h n k", h=self.config.num_heads)
            return Hits.nothing(like, self.config.top_k)
        first = packed(hidden, decision.search)[0][:, :most]
        return self.backend.search(self.address(self.query_address, first), state).spread(decision.search)

    def address(self, proj: nn.Linear, features: Tensor) -> Tensor:
        """Unit vectors by head; features: [b n d] -> [b h n k]."""
        return unit(rearrange(proj(features), "b n (h k) -> b h n k", h=self.config.num_heads))

    def scored(self, hits: Hits) -> Hits:
        """Cosines as scores, each head with its own sharpness."""
        score = rearrange(self.sharpness, "h -> h 1 1") * hits.score
        lowest = torch.finfo(score.dtype).min / 2  # finite: an empty memory must not give NaN
        score = score.masked_fill(~hits.exist, lowest)
        if self.config.newest_within is not None:
            score = score.masked_fill(outdated(score, hits.serial, self.config.newest_within), lowest)
        return replace(hits, score=score)

    # --------------------------------------------------------------------------------------- writing

    def write(self, hidden: Tensor, state: Any, mask: Tensor) -> State:
        hidden, valid = packed(hidden, mask)
        last = state.last.to(hidden.dtype)
        count = rearrange(valid.sum(1), "b -> b 1")
        newest = take_rows(hidden, (count - 1).clamp(min=0))[:, 0]
        new = NewPairs(
            keys=self.address(self.key_address, token_shift(hidden, self.shift, last)),
            values=rearrange(self.v_proj(hidden), "b n (h k) -> b h n k", h=self.config.num_heads),
            valid=valid,
            last=torch.where(count > 0, newest, last),
        )
        return self.backend.append(new, state, partial(self.retrieved, hidden, state, valid))

    @torch.no_grad()
    def retrieved(self, hidden: Tensor, state: Any, valid: Tensor) -> tuple[Hits, Tensor]:
        """The hits of a segment's tokens and their weights [b h n j], which eviction may ask for."""
        hits = self.scored(self.search(hidden, state.cast(hidden.dtype), self.decide(hidden)))
        return hits, hits.weight * rearrange(valid, "b n -> b 1 n 1")

    @property
    def adds_losses(self) -> bool:
        return self.retrieval is not None and bool(self.config.retrieval_cost)

    def losses(self, hidden: Tensor, state: Any, mask: Tensor) -> dict[str, Tensor]:
        """retrieval_cost x mean sigma(g): gates then open where retrieval is worth that much."""
        if self.retrieval is None or not self.adds_losses:
            return {}
        gate = torch.sigmoid(self.retrieval.logit(hidden)) * mask
        opened, tokens = self.batch_sum(gate.sum()), self.batch_sum(mask.sum())
        return {"retrieval": self.config.retrieval_cost * opened / tokens.clamp(min=1)}


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
    """A segment's real tokens first, in order, then zeros; and which are real: [b n d], [b n]."""
    order = torch.argsort((~mask).byte(), dim=1, stable=True)
    valid = mask.gather(1, order)
    hidden = take_rows(hidden, order)
    return hidden * rearrange(valid, "b n -> b n 1"), valid
