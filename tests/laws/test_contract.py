"""What the contract offers beyond read and write: one toy memory of each kind, held to the laws.

Each toy is the smallest memory of a family that is to come: a compressive memory that uses its layer's own
heads (Infini-attention), tokens of a memory's own in the window (memory tokens), a table addressed by token
ids (n-grams), and a small network that is trained as it is written (Titans).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config.fields import option
from memlib.config.memory import MemoryOptions
from memlib.memory import Memory, State, axes
from memlib.memory.base import AttentionHeads, zeros
from memlib.memory.gates import HeadGate
from memlib.nn.linear import Linear

from .cases import Case
from .laws import FEEDINGS, MANY, bounded, causality, every_law, segmentation
from .toys import register


class InAttention(MemoryOptions):
    @property
    def in_attention(self) -> bool:
        return True


@dataclass(kw_only=True)
class CompressiveConfig(InAttention):
    """One matrix a head, of the layer's keys and values."""


@dataclass(frozen=True)
class CompressiveState(State):
    """matrix: [b h k e]; norm: [b h k]."""

    matrix: Tensor = axes("batch head feature value")
    norm: Tensor = axes("batch head feature")


class Compressive(Memory):
    """Infini-attention's linear memory: A = (1 - g) A_window + g sigma(Q) M / (sigma(Q) z), by head.

    M <- M + sum_t sigma(k_t) v_t,  z <- z + sum_t sigma(k_t),  sigma = elu + 1, of the layer's own queries,
    keys and values without positions. Source: Munkhdalai et al. 2024, arXiv 2404.07143, eq. 3-5.
    """

    uses_heads = True

    def __init__(self, config: CompressiveConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.gate = HeadGate(2)

    def init_state(self, batch_size: int) -> CompressiveState:
        k = self.hidden_dim // 2
        return CompressiveState(zeros(self, batch_size, 2, k, k), zeros(self, batch_size, 2, k))

    def mix(self, heads: AttentionHeads, state: CompressiveState) -> Tensor:
        q = F.elu(heads.queries) + 1
        total = einsum(q, state.norm, "b h n k, b h k -> b h n").clamp(min=1e-6)
        read = einsum(q, state.matrix, "b h n k, b h k e -> b h n e") / rearrange(total, "b h n -> b h n 1")
        return torch.lerp(heads.attended, read, rearrange(torch.sigmoid(self.gate.bias), "h -> h 1 1"))

    def write(self, hidden, state, mask, keys, values) -> CompressiveState:
        keys = (F.elu(keys) + 1) * rearrange(mask, "b n -> b 1 n 1")
        return CompressiveState(
            state.matrix + einsum(keys, values, "b h n k, b h n e -> b h k e"), state.norm + keys.sum(2)
        )

    def close(self) -> None:
        nn.init.constant_(self.gate.bias, -torch.inf)


@dataclass(kw_only=True)
class TokensConfig(InAttention):
    """A few tokens that the whole window attends to."""

    num_tokens: int = option(3, "tokens", 1)


@dataclass(frozen=True)
class TokensState(State):
    """tokens: [b m d]."""

    tokens: Tensor = axes("batch slot feature")


class Tokens(Memory):
    """Memory tokens in the window: attended to through the layer's own projections, in one softmax.

    After a segment each token moves towards what it attends to in it (RMT's tokens, one layer at a time).
    """

    uses_logsumexp = True

    def __init__(self, config: TokensConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.start = nn.Parameter(torch.empty(config.num_tokens, hidden_dim))
        self.bias = HeadGate(2)
        self.query = Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.start)

    def init_state(self, batch_size: int) -> TokensState:
        return TokensState(repeat(self.start, "m d -> b m d", b=batch_size))

    def mix(self, heads: AttentionHeads, state: TokensState) -> Tensor:
        keys, values = heads.project(state.tokens)
        score = einsum(heads.queries, keys, "b h n k, b h m k -> b h n m") * keys.shape[-1] ** -0.5
        own = torch.logsumexp(score, -1) + rearrange(self.bias.bias, "h -> h 1")
        share = torch.sigmoid(own - heads.logsumexp)
        read = einsum(torch.softmax(score, -1), values, "b h n m, b h m k -> b h n k")
        return torch.lerp(heads.attended, read, rearrange(share, "b h n -> b h n 1"))

    def write(self, hidden, state, mask) -> TokensState:
        score = einsum(self.query(state.tokens), hidden, "b m d, b n d -> b m n")
        weight = torch.softmax(score.masked_fill(~rearrange(mask, "b n -> b 1 n"), -1e9), -1)
        return TokensState(0.5 * state.tokens + 0.5 * einsum(weight, hidden, "b m n, b n d -> b m d"))

    def close(self) -> None:
        nn.init.constant_(self.bias.bias, -torch.inf)


@dataclass(kw_only=True)
class BigramsConfig(MemoryOptions):
    """A table of learned rows, addressed by two token ids."""

    rows: int = option(7, "rows of the table", 1)

    @property
    def carries(self) -> bool:
        return False


@dataclass(frozen=True)
class LastIdState(State):
    """last: [b], the newest token's id, -1 before the first."""

    last: Tensor = axes("batch")


class Bigrams(Memory):
    """y_t = table[(31 x_t + x_{t-1}) mod rows]: what is read depends on ids, also across segments."""

    uses_ids = True

    def __init__(self, config: BigramsConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.table = nn.Embedding(config.rows, hidden_dim)

    def init_state(self, batch_size: int) -> LastIdState:
        return LastIdState(zeros(self, batch_size, dtype=torch.int64) - 1)

    def with_open_segment(self, state, hidden, mask) -> LastIdState:
        return OpenIdState(state.last, mask)

    def read(self, hidden, state, ids) -> Tensor:
        before = previous_real(ids, state.mask, state.last)[:, -hidden.shape[1] :]
        return self.table((31 * ids[:, -hidden.shape[1] :] + before) % self.config.rows)

    def write(self, hidden, state, mask, ids) -> LastIdState:
        after = torch.cat((ids, ids[:, -1:]), 1)
        real = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        return LastIdState(previous_real(after, real, state.last)[:, -1])


@dataclass(frozen=True)
class OpenIdState(State):
    """last: [b]; mask: [b n], of the open segment."""

    last: Tensor = axes("batch")
    mask: Tensor = axes("batch token")


def previous_real(ids: Tensor, mask: Tensor, last: Tensor) -> Tensor:
    """The id of the real token before each token: [b n] -> [b n]."""
    place = torch.where(mask, torch.arange(ids.shape[1]), -1).cummax(1).values
    before = F.pad(place, (1, 0), value=-1)[:, :-1]
    return torch.where(before < 0, rearrange(last, "b -> b 1"), ids.gather(1, before.clamp(min=0)))


@dataclass(kw_only=True)
class LearnerConfig(MemoryOptions):
    """A linear map that is trained on each segment."""


@dataclass(frozen=True)
class LearnerState(State):
    """weight: [b k e]."""

    weight: Tensor = axes("batch feature value")


class Learner(Memory):
    """Titans in small: W <- W - rate grad |k W - v|^2, the gradient taken by autograd inside the write."""

    def __init__(self, config: LearnerConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.key, self.value = Linear(hidden_dim, 8), Linear(hidden_dim, hidden_dim)

    def init_state(self, batch_size: int) -> LearnerState:
        return LearnerState(zeros(self, batch_size, 8, self.hidden_dim))

    def read(self, hidden, state) -> Tensor:
        return F.normalize(self.key(hidden), dim=-1) @ state.weight

    def write(self, hidden, state, mask) -> LearnerState:
        keys = F.normalize(self.key(hidden), dim=-1) * rearrange(mask, "b n -> b n 1")
        values = torch.tanh(self.value(hidden)) * rearrange(mask, "b n -> b n 1")

        def loss(weight: Tensor) -> Tensor:
            return 0.5 * (keys @ weight - values).square().sum()

        count = rearrange(mask.sum(1).clamp(min=1), "b -> b 1 1")
        return LearnerState(state.weight - torch.func.grad(loss)(state.weight) / count)


TOYS = {
    "compressive": (Compressive, CompressiveConfig),
    "tokens": (Tokens, TokensConfig),
    "bigrams": (Bigrams, BigramsConfig),
    "learner": (Learner, LearnerConfig),
}


def case(kind, **memory) -> Case:
    return Case(f"toy-{kind}", {"memory_sharing": "per_layer"} | memory, {kind: {}})


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_the_laws_hold_for_a_memory_of_each_kind(monkeypatch, kind, sharing):
    register(monkeypatch, **TOYS)
    every_law(case(kind, memory_sharing=sharing))


def test_they_stand_in_one_layer_with_the_others(monkeypatch):
    register(monkeypatch, **TOYS)
    together = Case("toys", {"memory_sharing": "per_layer"}, {kind: {} for kind in TOYS} | {"internal": {}})
    for law in (causality, segmentation, bounded):
        law(together.build, FEEDINGS[2])


class IgnoresTheSegmentBefore(Bigrams):
    """N-grams that break where a segment begins."""

    def write(self, hidden, state, mask, ids):
        return super().init_state(len(ids))


class ReadsAhead(Bigrams):
    """N-grams of a token and the next one."""

    def read(self, hidden, state, ids):
        return self.table((31 * ids + ids.roll(-1, 1))[:, -hidden.shape[1] :] % self.config.rows)


def test_ids_reach_across_segments(monkeypatch):
    """The first token of a segment is read with the last id of the segment before."""
    results = []
    for memory in (Bigrams, IgnoresTheSegmentBefore):
        register(monkeypatch, bigrams=(memory, BigramsConfig))
        model = case("bigrams", memory_layer_placement="custom", memory_layer_custom=[0]).build()
        ids = torch.arange(8).reshape(1, 8)
        results.append(model(ids).logits)
    assert torch.equal(results[0][:, :4], results[1][:, :4])
    assert not torch.allclose(results[0][:, 4], results[1][:, 4])


def test_ids_of_the_future_are_caught(monkeypatch):
    register(monkeypatch, bigrams=(ReadsAhead, BigramsConfig))
    with pytest.raises(AssertionError, match=r"^L1"):
        causality(case("bigrams").build, MANY)


def test_a_layers_own_keys_are_found_by_its_own_queries(monkeypatch):
    """The same tokens in two segments: their keys are the same, so the memory returns their values."""
    register(monkeypatch, **TOYS)
    model = case("compressive", memory_layer_placement="custom", memory_layer_custom=[0]).build()
    memory, seen = model.block(0).memories["compressive"], []
    mix, write = memory.mix, memory.write
    memory.mix = lambda heads, state: (seen.append(heads.keys), mix(heads, state))[1]
    memory.write = lambda *given, keys, values: (
        seen.append(keys),
        write(*given, keys=keys, values=values),
    )[1]
    ids = torch.tensor([[3, 1, 4, 1]])
    with torch.no_grad():
        state = model(ids[:, :3]).memory_state
        model(ids[:, 3:], memory_state=state)
    first, last, written = seen
    torch.testing.assert_close(written, torch.cat((first, last), 2))
