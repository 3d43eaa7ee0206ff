"""Generation token by token, with memory.

The memory state includes the open window with its keys and values, so the state is the cache: a step reads
one token. Without the cache (`cached: False`) each step reads the whole row again from its initial state.
The tokens are the same; this mode exists to test the cache.

A row's result does not depend on the other rows or their lengths (law L3): see row_groups.py.

Axes: b batch, t tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from memlib.inference.row_groups import kept, read, row_groups, row_states
from memlib.inference.sampling import choose
from memlib.models import MemoryState
from memlib.models.eval_mode import eval_mode
from memlib.models.protocol import RecurrentModel

Generators = torch.Generator | Sequence[torch.Generator] | None
States = MemoryState | Sequence[MemoryState] | None

COLDEST = 1e-6  # below, differences of logits divided by the temperature leave float32


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of sampling and stopping.

    max_new_tokens: maximum tokens per row; temperature: 0 takes the most probable token, 1 samples from the
    model's distribution; top_k: sample from the k most probable tokens; top_p: sample from the smallest set
    of tokens with total probability p; stop_tokens: ids that end a row (the row includes them); cached: read
    each token once.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: tuple[int, ...] = ()
    cached: bool = True

    def __post_init__(self) -> None:
        stops = [("stop_tokens", token) for token in self.stop_tokens]
        for name, number in (("max_new_tokens", self.max_new_tokens), ("top_k", self.top_k), *stops):
            if number is not None and not isinstance(number, Integral):
                raise ValueError(f"{name} = {number!r}: must be a whole number (an int)")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if self.temperature and not COLDEST <= self.temperature < math.inf:
            raise ValueError(
                f"temperature = {self.temperature}: must be 0 (the most probable token) or at least {COLDEST}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be above 0 and at most 1, or None for all tokens")
        if not self.temperature and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p apply to sampling only: set temperature above 0")


class Token(NamedTuple):
    """A generated token: its row, its id, and whether it is the row's last."""

    row: int
    id: int
    last: bool


@dataclass(frozen=True)
class Generation:
    """Generated tokens [b t], padded with 0; lengths [b]; stopped [b], whether a stop token ended the row.

    states: each row's state after its prompt and all its tokens, as a batch of one.
    """

    tokens: Tensor
    lengths: Tensor
    stopped: Tensor
    states: list[MemoryState]

    @property
    def mask(self) -> Tensor:
        """True for generated tokens: [b t]."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return position < rearrange(self.lengths, "b -> b 1")

    def row(self, number: int) -> list[int]:
        """The tokens of one row."""
        return self.tokens[number, : self.lengths[number]].tolist()

    @property
    def memory_state(self) -> MemoryState:
        """The rows' states as one batch, for a forward pass.

        Raises ValueError if the rows' open windows have different lengths, because a forward pass needs
        one length; `generate` accepts `states` in any case.
        """
        lengths = [state.window.length for state in self.states]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the rows have {lengths} tokens in their open windows, but a batch needs one length: "
                "continue with generate(…, memory_state=generation.states), or use single rows' states"
            )
        return self.states[0].join(*self.states[1:])


class TokenStream(Iterator[Token]):
    """Iterator over generated tokens, step by step and, within a step, row by row.

    `tokens` holds the tokens of each row so far; `states` holds each row's state after its prompt and these
    tokens. Both are valid at any time. Between two tokens the model may be used for other calls.
    """

    def __init__(
        self,
        model: RecurrentModel,
        prompts: Sequence[Sequence[int]],
        memory_state: States = None,
        config: GenerationConfig | None = None,
        generator: Generators = None,
    ) -> None:
        if empty := [row for row, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompt {empty[0]} has no tokens: give at least one")
        self.model, self.config = model, config or GenerationConfig()
        self.generators = one_each(generator, len(prompts))
        self.groups = self.first = row_groups(separated(model, memory_state, len(prompts)))
        self.history: list[list[int]] = [[] for _ in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.stopped = [False] * len(prompts)
        self.going = list(range(len(prompts)))
        self.pending = {row: list(prompt) for row, prompt in enumerate(prompts)}
        self.logits: dict[int, Tensor] = {}
        self.done: dict[int, MemoryState] = {}
        self.ready: deque[Token] = deque()

    def __next__(self) -> Token:
        if not self.ready:
            self.step()
        if not self.ready:
            raise StopIteration
        return self.ready.popleft()

    @property
    def states(self) -> list[MemoryState]:
        """Each row's state after its prompt and `tokens`."""
        self.read_on()
        by_row = self.done | row_states(self.groups)
        return [by_row[row] for row in sorted(by_row)]

    def step(self) -> None:
        """Read all pending tokens, and choose one more token for each unfinished row."""
        self.read_on()
        if not self.going:
            return
        config, going = self.config, list(self.going)
        if broken := [row for row in going if not bool(self.logits[row].isfinite().any())]:
            raise ValueError(
                f"the model's logits of row {broken[0]} are no numbers: its weights or its memory state hold "
                "NaN; load an earlier checkpoint or state"
            )
        chosen = choose(
            torch.stack([self.logits[row] for row in going]),
            config.temperature,
            config.top_k,
            config.top_p,
            [self.generators[row] for row in going],
        )
        for row, token in zip(going, chosen.tolist(), strict=True):
            self.tokens[row].append(token)
            self.pending[row] = [token]
            self.stopped[row] = token in config.stop_tokens
            last = self.stopped[row] or len(self.tokens[row]) == config.max_new_tokens
            if last:
                self.going.remove(row)
            self.ready.append(Token(row, token, last))

    def read_on(self) -> None:
        """Read each row's pending tokens; the states of finished rows move to `done`."""
        if not self.pending:
            return
        for row, ids in self.pending.items():
            self.history[row] += ids
        with eval_mode(self.model):
            if self.config.cached:
                groups, self.logits = read(self.model, self.groups, self.pending)
            else:
                whole = {row: self.history[row] for row in self.pending}
                groups, self.logits = read(self.model, kept(self.first, whole), whole)
        self.pending = {}
        ended = {row for group in groups for row in group.rows} - set(self.going)
        self.done |= row_states(kept(groups, ended))
        self.groups = kept(groups, self.going)


def stream(
    model: RecurrentModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    memory_state: States = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    generator: Generators = None,
    cached: bool = True,
) -> TokenStream:
    """Like `generate`, but returns an iterator over tokens.

    >>> for row, token, last in stream(model, prompt, max_new_tokens=20): ...
    """
    model.check(input_ids, attention_mask, None, None)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=tuple(stop_tokens),
        cached=cached,
    )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [ids[keep].tolist() for ids, keep in zip(input_ids, mask.bool(), strict=True)]
    return TokenStream(model, prompts, memory_state, config, generator)


def generate(
    model: RecurrentModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    memory_state: States = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    generator: Generators = None,
    cached: bool = True,
) -> Generation:
    """Generate tokens that continue prompts, starting from given memory states.

    input_ids: [b t]; attention_mask: [b t], 0 for padding, which is removed, so a row's result depends on its
    own tokens only. memory_state: the state of an earlier call, either of a batch or one per row
    (`Generation.states`). generator: one for all rows, used in order, or one per row, which makes sampled
    rows independent of each other. For the other options see `GenerationConfig`.

    >>> first = generate(model, prompt, max_new_tokens=50)
    >>> more = generate(model, next_prompt, memory_state=first.states)

    Raises ValueError for invalid options, shapes, ids or states.
    """
    tokens = stream(
        model,
        input_ids,
        attention_mask,
        memory_state,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        generator=generator,
        cached=cached,
    )
    return drained(tokens)


def drained(tokens: TokenStream) -> Generation:
    """Run a `TokenStream` to its end and return all its tokens."""
    deque(tokens, maxlen=0)
    device = tokens.model.device
    lengths = [len(row) for row in tokens.tokens]
    padded = [row + [0] * (max(lengths) - len(row)) for row in tokens.tokens]
    return Generation(
        torch.tensor(padded, device=device),
        torch.tensor(lengths, device=device),
        torch.tensor(tokens.stopped, device=device),
        tokens.states,
    )


def separated(model: RecurrentModel, memory_state: States, rows: int) -> list[MemoryState]:
    """One state per row, from a batch's state, a list of states, or None."""
    state = model.init_state(rows) if memory_state is None else memory_state
    if isinstance(state, MemoryState):
        given = state.window.mask.shape[0]
        index = torch.arange(given, device=state.window.mask.device)
        states = [state.rows(row) for row in index.split(1)]
    else:
        states, given = list(state), len(state)
    if given != rows:
        raise ValueError(
            f"memory_state holds {given} rows, but there are {rows} prompts: give one state each, or None"
        )
    for row, one in enumerate(states):
        if one.window.mask.shape[0] != 1:
            raise ValueError(
                f"memory_state[{row}] holds {one.window.mask.shape[0]} rows: in a list each state must have 1"
            )
    return states


def one_each(generator: Generators, rows: int) -> list[torch.Generator | None]:
    """One generator, or None, per row."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * rows
    if len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} prompts: give one, or one per prompt")
    return list(generator)
