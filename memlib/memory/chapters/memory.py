"""Learnable memory tokens in chapters; a router selects the few chapters that a stream reads.

Axes: b batch, n tokens of a segment, d hidden, m memory tokens, e their width, c chapters, k selected
chapters, u projected chapters, t tokens of a chapter, w window, g decisions (1 for a row, or n).

The tokens are parameters: the state holds only the input of the selection. A selection must not depend on
tokens after the one it serves (law L1):

| strategy | input of the selection |
| --- | --- |
| sequence | the mean of the segment before, the same for the whole segment |
| rolling | the mean of the last `routing_window_size` tokens up to this one, across segment borders |
| token | the token itself |
| hybrid | half sequence, half rolling |

With the router's weights w_c, log w_c is added to the scores of chapter c's tokens:

    y = (sum_c w_c) softmax(Q K^T / sqrt(k) + log w_c) V W_o       over the selected chapters' tokens

Even weights on all chapters are then exactly the whole bank. The router's gradient comes from the effect of
its weights on the attention; for k = 1 from the factor in front (`memlib.memory.chapters.routers`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from memlib.config import ChaptersMemoryConfig
from memlib.memory.base import Memory, State, axes, zeros
from memlib.memory.chapters.attention import MemoryCrossAttention
from memlib.memory.chapters.banks import ChapteredMemoryBank, MemoryBank, create_memory_bank
from memlib.memory.chapters.quantization import QuantizedMemoryBank
from memlib.memory.chapters.routers import (
    ChapterRouter,
    Choice,
    Losses,
    RouterLossOptions,
    masked_mean,
)
from memlib.nn.hook_point import HookPoint
from memlib.ops import newest_tokens, rolling_mean


@dataclass(frozen=True)
class ChapterState(State):
    """summary: [b d], the mean of the segment before; seen: [b], whether there was one;
    recent: [b w d], the newest tokens, and mask: [b w], which of them exist.

    While a segment is open, `recent` also holds its tokens so far, and `mask` also those to come.
    """

    summary: Tensor = axes("batch feature")
    seen: Tensor = axes("batch")
    recent: Tensor = axes("batch token feature")
    mask: Tensor = axes("batch token")

    def where(self, rows: Tensor, other: State) -> ChapterState:
        """`State.where`; a shorter window, of another strategy, is filled up in front."""
        other = cast(ChapterState, other)
        count = max(self.mask.shape[1], other.mask.shape[1])
        return super(ChapterState, self.widened(count)).where(rows, other.widened(count))

    def widened(self, count: int) -> ChapterState:
        missing = count - self.mask.shape[1]
        recent, mask = F.pad(self.recent, (0, 0, missing, 0)), F.pad(self.mask, (missing, 0), value=False)
        return replace(self, recent=recent, mask=mask) if missing else self


class ChapterMemory(Memory):
    """A bank of learnable tokens, read whole or by selected chapters.

    Layers of one group (`memory_sharing`) share its tokens. Each has its own projections, router and state.
    """

    shares_state = False
    config: ChaptersMemoryConfig

    def __init__(self, config: ChaptersMemoryConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        self.bank = make_bank(config, hidden_dim)
        self.attention = MemoryCrossAttention(
            hidden_dim,
            config.num_heads,
            self.bank.dim,
            config.use_low_rank_projections,
            config.projection_rank,
            reduced_dim_mode=config.use_low_rank_memory and config.low_rank_mode == "reduced_dim",
            use_flash_attention=config.use_flash_attention,
            gradient_checkpointing=config.gradient_checkpointing,
            wo_init_zero=False,  # the block's fusion is what starts at zero
        )
        self.router: ChapterRouter | None = None
        if config.use_chapters:
            self.router = make_router(config, hidden_dim)
        self.weight_point = HookPoint("weight", "batch token chapter")
        self.probability_point = HookPoint("probability", "batch token chapter")

    def share(self, first: Memory) -> None:
        self.bank = cast(ChapterMemory, first).bank

    @property
    def strategy(self) -> str:
        """The current routing strategy; training and inference may differ."""
        return self.config.routing_strategy_train if self.training else self.config.routing_strategy_inference

    @property
    def window(self) -> int:
        """Tokens kept for the rolling window: none if the strategy does not use them."""
        return self.config.routing_window_size if self.strategy in ("rolling", "hybrid") else 0

    # ------------------------------------------------------------------------------------- the contract

    def init_state(self, batch_size: int) -> State:
        if self.router is None:
            return State()
        return ChapterState(
            summary=zeros(self, batch_size, self.hidden_dim),
            seen=zeros(self, batch_size, dtype=torch.bool),
            recent=zeros(self, batch_size, self.window, self.hidden_dim),
            mask=zeros(self, batch_size, self.window, dtype=torch.bool),
        )

    def with_open_segment(self, state: State, hidden: Tensor, mask: Tensor) -> State:
        if not isinstance(state, ChapterState) or not self.window:
            return state
        recent, known = torch.cat((state.recent, hidden), 1), torch.cat((state.mask, mask), 1)
        return replace(state, recent=recent, mask=known)

    def read(self, hidden: Tensor, state: State) -> Tensor:
        if self.router is None:
            return self.attention(hidden, self.bank())
        choice = self.router.choose(self.summary(hidden, cast(ChapterState, state)))
        self.record(choice, hidden.shape[1])
        log_weights = choice.log_weights.to(hidden.dtype)
        read = self.read_chapters(hidden, choice.indices, log_weights)
        return log_weights.exp().sum(-1, keepdim=True) * read

    def read_chapters(self, hidden: Tensor, indices: Tensor, log_weights: Tensor) -> Tensor:
        """Attention over the tokens of selected chapters: [b n d]; indices, log_weights: [b g k]."""
        bank = cast(ChapteredMemoryBank, self.bank)
        if indices.shape[1] == 1:
            chapters, place = gathered(indices, bank.num_chapters)
            bias = repeat(log_weights, "b 1 k -> b 1 (k t)", t=bank.tokens_per_chapter)
            return self.attention(hidden, bank.chapters(chapters), bias, rearrange(place, "b 1 k -> b k"))
        chapters, _ = gathered(indices, bank.num_chapters)
        closed = hidden.new_full((*hidden.shape[:2], bank.num_chapters), -torch.inf)
        bias = closed.scatter(-1, indices, log_weights)[..., chapters]
        again = (rearrange(chapters, "u -> u 1") == chapters).tril(-1).any(-1)  # read once is enough
        bias = repeat(bias.masked_fill(again, -torch.inf), "b n u -> b n (u t)", t=bank.tokens_per_chapter)
        tokens = rearrange(bank.chapters(chapters), "u t e -> (u t) e")
        return self.attention(hidden, tokens, bias)

    def write(self, hidden: Tensor, state: State, mask: Tensor) -> State:
        if not isinstance(state, ChapterState):
            return state
        tokens = hidden.to(state.recent.dtype)
        known = torch.cat((state.mask, mask), 1)
        recent, known = newest_tokens(torch.cat((state.recent, tokens), 1), known, self.window)
        return ChapterState(masked_mean(tokens, mask), state.seen | mask.any(1), recent, known)

    @property
    def adds_losses(self) -> bool:
        return self.router is not None and bool(self.router.coefficients)

    def losses(self, hidden: Tensor, state: State, mask: Tensor) -> Losses:
        """The router's losses for a finished segment; a new stream has no selection yet."""
        if self.router is None or not self.adds_losses:
            return {}
        state = cast(ChapterState, state)
        whole = self.with_open_segment(state, hidden[:, :0], mask)
        choice = self.router.choose(self.summary(hidden, cast(ChapterState, whole)))
        counts = mask
        if self.strategy == "sequence":
            counts = rearrange(state.seen & mask.any(1), "b -> b 1")
        return self.router.losses(choice, counts)

    # --------------------------------------------------------------------------------------- the choice

    def summary(self, hidden: Tensor, state: ChapterState) -> Tensor:
        """Inputs of the selections: hidden [b n d] -> [b g d]."""
        if self.strategy == "token":
            return hidden
        before = rearrange(state.summary, "b d -> b 1 d")
        if self.strategy == "sequence":
            return before
        tokens = torch.cat((state.recent, hidden), 1)
        mask = F.pad(state.mask, (0, tokens.shape[1] - state.mask.shape[1]), value=True)
        rolling = rolling_mean(tokens, mask, self.config.routing_window_size, hidden.shape[1])
        if self.strategy == "rolling":
            return rolling
        share = rearrange(state.seen, "b -> b 1 1").to(hidden.dtype)
        return (rolling + share * before) / (1 + share)

    def record(self, choice: Choice, n: int) -> None:
        """Weights and probabilities of every chapter for every token, for recordings: [b n c]."""

        def for_tokens(values: Tensor) -> Tensor:
            return values if values.shape[1] == n else repeat(values, "b 1 c -> b n c", n=n)

        empty = torch.zeros_like
        self.weight_point(
            lambda: for_tokens(empty(choice.logits).scatter(-1, choice.indices, choice.weights))
        )
        self.probability_point(lambda: for_tokens(torch.softmax(choice.logits, -1)))


def gathered(indices: Tensor, num_chapters: int) -> tuple[Tensor, Tensor]:
    """Chapters to project, and the index of each selection among them: indices [b g k] -> [u], [b g k].

    The selected chapters, or all of them if there are as many selections; shapes decide, so that a graph can
    be compiled.
    """
    if indices.numel() >= num_chapters:
        return torch.arange(num_chapters, device=indices.device), indices
    chosen = rearrange(indices, "b g k -> (b g k)")
    place = torch.arange(len(chosen), device=indices.device)
    return chosen, rearrange(place, "(b g k) -> b g k", b=indices.shape[0], g=indices.shape[1])


def make_bank(config: ChaptersMemoryConfig, hidden_dim: int) -> MemoryBank:
    """Build the bank of a configuration, quantised and in chapters as configured."""
    bank = create_memory_bank(
        config.num_memory_tokens,
        config.memory_dim or hidden_dim,
        config.use_low_rank_memory,
        config.memory_rank,
        config.low_rank_mode,
        config.init_std,
    )
    if config.quantize_memory:
        bank = QuantizedMemoryBank(bank, config.memory_quant_bits, config.quant_group_size)
    if config.use_chapters:
        bank = ChapteredMemoryBank(bank, config.num_chapters, config.tokens_per_chapter)
    return bank


def make_router(config: ChaptersMemoryConfig, hidden_dim: int) -> ChapterRouter:
    """Build the router of a configuration."""
    losses = RouterLossOptions(
        config.use_load_balance_loss,
        config.load_balance_coefficient,
        config.use_auxiliary_loss,
        config.auxiliary_loss_coefficient,
        config.use_z_loss,
        config.z_loss_coefficient,
    )
    return ChapterRouter(hidden_dim, config.num_chapters, config.top_k_chapters, losses)
