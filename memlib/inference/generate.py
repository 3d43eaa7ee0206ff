"""Generation: one token after another, each read into the memory before the next is chosen.

The open window travels in the memory state, keys and values included, so the state is the cache: a step
reads one token. Without cache (`cached: False`) each step reads the whole stream again from its initial
state; the tokens are the same, which is what that mode is for.

A row's result is what it would be alone (law L3), whatever the other rows' lengths are: see row_groups.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to go on: what is drawn from, and where it ends.

    max_new_tokens: tokens of a row at most; temperature: 0 takes the most probable token, 1 draws from
    the model's distribution; top_k, top_p: draw from the k most probable, from the fewest whose
    probabilities sum to p; stop_tokens: ids after which a row ends, themselves included in it;
    cached: read each token once.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: tuple[int, ...] = ()
    cached: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature = {self.temperature}: must be 0 (the most probable token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be above 0 and at most 1, or None for all tokens")
        if not self.temperature and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p choose what is drawn from: set temperature above 0 too")


class Token(NamedTuple):
    """A token as it comes: which row it goes on with, its id, and whether it is that row's last."""

    row: int
    id: int
    last: bool


@dataclass(frozen=True)
class Generation:
    """What was generated: tokens [b t], 0 behind a row's end; lengths [b]; stopped [b], by a stop token.

    states: for each row, as a batch of one, what it remembers: its prompt and all its tokens.
    """

    tokens: Tensor
    lengths: Tensor
    stopped: Tensor
    states: list[MemoryState]

    @property
    def mask(self) -> Tensor:
        """True for generated tokens: [b t]."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return place < rearrange(self.lengths, "b -> b 1")

    def row(self, number: int) -> list[int]:
        """The tokens of one row."""
        return self.tokens[number, : self.lengths[number]].tolist()

    @property
    def memory_state(self) -> MemoryState:
        """The rows' states as one batch, for a forward pass.

        Raises ValueError where rows stand at different places of their segments, which a forward pass
        cannot take; `generate` takes `states` in any case.
        """
        places = [state.window.length for state in self.states]
        if len(set(places)) > 1:
            raise ValueError(
                f"the rows have {places} tokens in their open windows, and one batch has one number of "
                "them: go on with generate(…, memory_state=generation.states), or take single rows' states"
            )
        return self.states[0].join(*self.states[1:])


class TokenStream(Iterator[Token]):
    """Tokens as they come, step by step and in a step row by row.

    `tokens` holds what each row has so far, `states` what it remembers of prompt and tokens: at any
    time, also when nobody asks for more. Between two tokens the model may be used for other things.
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
            raise ValueError(f"prompt {empty[0]} has no tokens: give at least one, what to go on from")
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
        """Each row's memory of its prompt and of `tokens`."""
        self.read_on()
        by_row = self.done | row_states(self.groups)
        return [by_row[row] for row in sorted(by_row)]

    def step(self) -> None:
        """Read what is still to be read, and choose one more token for each row that goes on."""
        self.read_on()
        if not self.going:
            return
        config, going = self.config, list(self.going)
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
        """Let the rows read their newest tokens; rows that have ended leave with their state."""
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
    """`generate`, token by token.

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

    input_ids: [b t]; attention_mask: [b t], 0 for padding, which is left out: a row's result is that of
    its own tokens alone, however long the others are. memory_state: what earlier calls left: a batch's
    state, or `Generation.states`, one for each row. generator: one for all rows, drawn from in order, or
    one for each row, which makes a drawn row independent of the others too. The rest is
    `GenerationConfig`'s.

    >>> first = generate(model, prompt, max_new_tokens=50)
    >>> more = generate(model, next_prompt, memory_state=first.states)

    Raises ValueError for options, shapes, ids or states that do not fit.
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
    """All that a stream still gives, and what it gave before."""
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
    """One state for each row, from a batch's state, a state for each, or none."""
    state = model.init_state(rows) if memory_state is None else memory_state
    if isinstance(state, MemoryState):
        given = state.window.mask.shape[0]
        index = torch.arange(given, device=state.window.mask.device)
        states = [state.rows(row) for row in index.split(1)]
    else:
        states, given = list(state), len(state)
    if given != rows:
        raise ValueError(
            f"memory_state holds {given} rows, the prompts are {rows}: give each prompt its state, or None"
        )
    for row, one in enumerate(states):
        if one.window.mask.shape[0] != 1:
            raise ValueError(
                f"memory_state[{row}] holds {one.window.mask.shape[0]} rows: in a list each state is of one"
            )
    return states


def one_each(generator: Generators, rows: int) -> list[torch.Generator | None]:
    """A generator, or None, for each row."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * rows
    if len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} prompts: give one for all, or one for each")
    return list(generator)
