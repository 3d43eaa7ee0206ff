"""External memory: past tokens' key-value pairs, of which each token retrieves the k most similar.

Axes: b batch, n tokens of a segment, c places of the memory, h heads, k head width, j hits that came
back for a query, d hidden.

After LongMem (Wang et al. 2023, arXiv 2306.07174) and Memorizing Transformers (Wu et al. 2022, arXiv
2203.08913), spec A3. What differs, and why:

- **Keys have no position.** Neither rotary angles nor distances enter a key, so a pair is found as well
  after sixty segments as after one. The price: of two equal keys, nothing but the tie rule (the newer
  comes first) says which is the later one.
- **One address for asking and filing**, and a value is filed under the token before it (token shift):
  from the first step on, a key that comes up again finds what followed it. In the papers queries and
  keys have their own projections, and no gradient reaches a stored key; docs/diary.md measures both.
- **Stored pairs stay in the graph** for as long as training's `horizon` reaches. The papers detach
  always; `horizon: 1` is that.
- **Every stream has its own memory** (LongMem's code has one for all rows of a batch), and it ends with
  the stream: it is a value that goes in and comes out.

Scores are `sharpness_h * cos(query, key)`, so that old keys keep their scale while the encoder moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import ExternalMemoryConfig
from memlib.memory.base import Memory, State
from memlib.memory.gates import HeadGate
from memlib.memory.search import exact_search
from memlib.nn.probe import Probe


@dataclass(frozen=True)
class ExternalState(State):
    """What one layer has stored of its streams.

    keys, values: [b h c k]; serial: [b c], which token of its stream stands in a place, -1 where none;
    retrieved: [b c], the weight with which it has come back so far, kept where eviction needs it;
    count: [b] tokens ever written; last: [b d], the newest of them, whose key the next one is filed under.
    """

    keys: Tensor
    values: Tensor
    serial: Tensor
    retrieved: Tensor
    count: Tensor
    last: Tensor


@dataclass(frozen=True)
class Recalled:
    """What came back for each query: score, serial: [b h n j]; values: [b h n j k].

    A hit that does not exist (an empty memory) has serial -1 and the lowest score there is.
    """

    score: Tensor
    serial: Tensor
    values: Tensor

    @property
    def weight(self) -> Tensor:
        """softmax over the hits; zero, not uniform, where there are none: [b h n j]."""
        return torch.softmax(self.score, -1) * (self.serial >= 0)

    @property
    def mean(self) -> Tensor:
        """The hits' values by their weights: [b h n k]."""
        return einsum(self.weight, self.values, "b h n j, b h n j k -> b h n k")


class ExternalMemory(Memory):
    """Tokens of past segments as key-value pairs; reads by attention over the k nearest (spec A3).

    `join` says how what came back meets the window's own attention A (M is the memory's softmax):

        fusion   M goes to the block's gating network, as the diagrams have it
        heads    (1 - g_h) A + g_h M,  g_h = sigma(b_h)                          LongMem, Memorizing Tr.
        joint    one softmax over window and hits together; b_h shifts the hits  TRIME, memorizing-tr.-pytorch
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
        self.in_attention = config.join != "fusion"
        if self.in_attention:
            self.gate = HeadGate(h, config.gate_init)
            self.gate_probe = Probe("batch head token")
        else:
            self.o_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.weight_probe = Probe("batch head token hit")
        self.score_probe = Probe("batch head token hit")
        self.source_probe = Probe("batch head token hit")

    def init_state(self, batch_size: int) -> ExternalState:
        b, c, h = batch_size, self.config.capacity, self.config.num_heads
        weight = self.v_proj.weight
        d = weight.shape[0]
        return ExternalState(
            keys=weight.new_zeros(b, h, c, d // h),
            values=weight.new_zeros(b, h, c, d // h),
            serial=torch.full((b, c), -1, device=weight.device),
            retrieved=weight.new_zeros(b, c),
            count=torch.zeros(b, dtype=torch.int64, device=weight.device),
            last=weight.new_zeros(b, d),
        )

    def read(self, hidden: Tensor, state: ExternalState) -> Tensor:
        """join: fusion. y = (softmax(score) V) W_o over each token's hits; hidden: [b n d] -> [b n d]."""
        found = self.probed(self.recall(hidden, state))
        return self.o_proj(rearrange(found.mean, "b h n k -> b n (h k)"))

    def mix(
        self, hidden: Tensor, attended: Tensor, logsumexp: Callable[[], Tensor], state: ExternalState
    ) -> Tensor:
        """join: heads, joint. (1 - w) A + w M by head; attended: [b h n k], logsumexp: -> [b h n].

        The joint softmax is the same mixture: M's share of the sum of both, w = sigma(lse(hits) + b_h -
        lse(window)). A token for which nothing came back keeps its window's attention as it is.
        """
        found = self.probed(self.recall(hidden, state))
        logit: Tensor = rearrange(self.gate.bias, "h -> h 1")
        if self.config.join == "joint":
            logit = torch.logsumexp(found.score, -1) + logit - logsumexp()
        weight = self.gate_probe(torch.sigmoid(logit) * (found.serial >= 0).any(-1))
        return torch.lerp(attended, found.mean, rearrange(weight, "b h n -> b h n 1"))

    def close(self) -> None:
        """Shut the memory out of the attention for good."""
        nn.init.constant_(self.gate.bias, -torch.inf)

    def address(self, proj: nn.Linear, features: Tensor) -> Tensor:
        """Unit vectors by head; features: [b n d] -> [b h n k]."""
        return F.normalize(rearrange(proj(features), "b n (h k) -> b h n k", h=self.config.num_heads), dim=-1)

    def recall(self, hidden: Tensor, state: ExternalState) -> Recalled:
        """The top_k stored tokens nearest to each token's query; hidden: [b n d]."""
        place, score = self.search(hidden, state)
        there = state_serial(state, place)
        score = rearrange(self.sharpness, "h -> h 1 1") * score
        score = score.masked_fill(there < 0, torch.finfo(score.dtype).min / 2)
        index = repeat(place, "b h n j -> b h (n j) k", k=state.values.shape[-1])
        values = rearrange(state.values.gather(2, index), "b h (n j) k -> b h n j k", n=hidden.shape[1])
        return Recalled(score, there, values)

    def search(self, hidden: Tensor, state: ExternalState) -> tuple[Tensor, Tensor]:
        """place and cosine of each query's hits, best first: [b h n j]; j is top_k."""
        # Places are taken up in order, so those beyond the fullest row are empty and not worth a look.
        used = max(int((state.serial >= 0).sum(1).max()), self.config.top_k)
        used = -(-used // self.config.chunk) * self.config.chunk
        query = self.address(self.query_address, hidden)
        score = einsum(query, state.keys[:, :, :used], "b h n k, b h c k -> b h n c")
        place = exact_search(score.detach(), state.serial[:, :used], self.config.top_k, self.config.chunk)
        return place, score.gather(-1, place)

    def probed(self, found: Recalled) -> Recalled:
        """For recordings: which past token of the stream came back, its score, its weight."""
        self.score_probe(found.score.masked_fill(found.serial < 0, -torch.inf))
        self.source_probe(found.serial)
        self.weight_probe(found.weight)
        return found

    def write(self, hidden: Tensor, state: ExternalState, mask: Tensor) -> ExternalState:
        hidden, valid = packed(hidden, mask)
        before = torch.cat((rearrange(state.last, "b d -> b 1 d"), hidden), 1)
        keys = self.address(self.key_address, torch.lerp(hidden, before[:, :-1], self.shift))
        values = rearrange(self.v_proj(hidden), "b n (h k) -> b h n k", h=self.config.num_heads)
        added = valid.sum(1)
        serial = rearrange(state.count, "b -> b 1") + torch.arange(hidden.shape[1], device=hidden.device)
        if self.config.eviction == "least_retrieved":
            retrieved = state.retrieved + self.came_back(hidden, state, valid)
            place = least_retrieved(state.serial, retrieved, hidden.shape[1])
        else:
            retrieved, place = state.retrieved, serial % self.config.capacity
        newest = repeat(added, "b -> b 1 d", d=hidden.shape[-1])
        return ExternalState(
            keys=put(keys, place, valid, state.keys),
            values=put(values, place, valid, state.values),
            serial=put(serial, place, valid, state.serial),
            retrieved=put(torch.zeros_like(retrieved[:, :1]).expand_as(serial), place, valid, retrieved),
            count=state.count + added,
            last=rearrange(before.gather(1, newest), "b 1 d -> b d"),
        )

    @torch.no_grad()
    def came_back(self, hidden: Tensor, state: ExternalState, valid: Tensor) -> Tensor:
        """The weight with which each place came back for a segment's tokens: [b c]."""
        place, _ = self.search(hidden, state)
        weight = self.recall(hidden, state).weight * rearrange(valid, "b n -> b 1 n 1")
        place, weight = (rearrange(t, "b h n j -> b (h n j)") for t in (place, weight))
        return torch.zeros_like(state.retrieved).scatter_add(1, place, weight)


def state_serial(state: ExternalState, place: Tensor) -> Tensor:
    """Which token stands at each place; place: [b h n j] -> [b h n j]."""
    _, h, n, _ = place.shape
    found = state.serial.gather(1, rearrange(place, "b h n j -> b (h n j)"))
    return rearrange(found, "b (h n j) -> b h n j", h=h, n=n)


def packed(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A segment's tokens with the ones that count first, in order; and which those are: [b n d], [b n]."""
    if bool(mask.all()):
        return hidden, mask
    order = torch.argsort((~mask).byte(), dim=1, stable=True)
    valid = mask.gather(1, order)
    hidden = hidden.gather(1, repeat(order, "b n -> b n d", d=hidden.shape[-1]))
    return hidden * rearrange(valid, "b n -> b n 1"), valid


def put(new: Tensor, place: Tensor, valid: Tensor, into: Tensor) -> Tensor:
    """A copy of `into` with the valid new items at their places.

    new: [b h n k] into [b h c k], or [b n] into [b c]; place, valid: [b n], the places distinct by row.
    """
    axis = into.ndim // 2
    if into.ndim == 4:
        h, k = into.shape[1], into.shape[3]
        place, valid = (repeat(t, "b n -> b h n k", h=h, k=k) for t in (place, valid))
    kept = torch.where(valid, new.to(into.dtype), into.gather(axis, place))
    return into.scatter(axis, place, kept)


def least_retrieved(serial: Tensor, retrieved: Tensor, n: int) -> Tensor:
    """The n places to give up: free ones first, then those that came back least, of equals the oldest.

    serial, retrieved: [b c] -> [b n].
    """
    free = serial < 0
    by_age = torch.argsort(serial.masked_fill(free, -1), dim=1, stable=True)
    weight = retrieved.masked_fill(free, -1.0).gather(1, by_age)
    return by_age.gather(1, torch.argsort(weight, dim=1, stable=True))[:, :n]
