"""Capacity of each memory, computed from its state.

Nothing is allocated: each memory is built on the meta device, and `init_state` gives the state of one
stream. Bytes count the whole state, counters included; places and values count only tensors that store
content.

Axes: b batch (one stream), e width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from memlib.config import Config, override
from memlib.evaluation.table import markdown
from memlib.memory import MEMORIES
from memlib.memory.base import State
from memlib.memory.chapters.memory import ChapterState
from memlib.memory.external.backends import ExternalState
from memlib.memory.hds import HdsState
from memlib.memory.ring import RingState

MILLION = 1_000_000
PLACES = {"slot", "block", "bank"}  # axes along which a state holds one thing beside another


@dataclass(frozen=True)
class Part:
    """A tensor that stores content: number of places, values per place, tokens per place.

    tokens_each is None if one place summarises the whole sequence.
    """

    name: str
    places: int
    width: int
    tokens_each: int | None = 1

    @property
    def tokens(self) -> int | None:
        return self.places * self.tokens_each if self.tokens_each else None

    @property
    def values(self) -> int:
        return self.places * self.width


@dataclass(frozen=True)
class Capacity:
    """The state of one stream in one memory; nbytes: of all of it, counters included."""

    name: str
    parts: list[Part]
    nbytes: int

    def part(self, name: str) -> Part:
        (found,) = (part for part in self.parts if part.name == name)
        return found


def capacity(kind: str, hidden_dim: int, name: str = "", **options: Any) -> Capacity:
    """The capacity of a registered memory in a model of width hidden_dim with heads of width 64.

    options: fields of the memory's configuration. Raises ConfigError for an unknown memory or bad options.
    """
    changes = {"model.hidden_dim": hidden_dim, "model.num_heads": hidden_dim // 64, "memory.kinds": [kind]}
    changes |= {f"memory.{kind}.{option}": value for option, value in options.items()}
    config = getattr(override(Config(), changes).memory, kind)
    with torch.device("meta"):
        memory = MEMORIES[kind](config, hidden_dim)
        state = memory.init_state(1)
    return Capacity(name or kind, parts_of(state, config), state.nbytes)


def parts_of(state: State, config: Any) -> list[Part]:
    """The tensors of a state that store content.

    For other memories: every floating-point tensor with at least two axes beside the batch. Its axes tell its
    places (slots, blocks, banks); a tensor without any, such as a matrix of keys by values, is one place that
    averages the whole stream.
    """
    if isinstance(state, HdsState):
        blocks, banks = state.level_1.blocks, state.banks
        return [
            Part("level 1, blocks", blocks.shape[1], blocks.shape[2], config.chunk_size),
            Part("level 2, summary", 1, state.level_2.mean.shape[1], None),
            Part("level 3, banks", banks.shape[1] * banks.shape[2], banks.shape[3]),
        ]
    if isinstance(state, RingState):
        stores = {"ring": state.ring.items, "store": state.store.items}
        return [Part(name, items.slots.shape[1], items.slots.shape[2]) for name, items in stores.items()]
    if isinstance(state, ChapterState):  # content is in the parameters; the state only selects chapters
        summary, recent = state.summary, state.recent
        parts = [Part("last segment, mean", 1, summary.shape[1], None)]
        return parts + [Part("recent tokens", *recent.shape[1:])] * bool(recent.shape[1])
    if isinstance(state, ExternalState):
        h, c, k = state.keys.shape[1:]
        return [Part("pairs", c, 2 * h * k)]
    parts = []
    for name, tensor, labels in state.labelled_tensors():
        if tensor.is_floating_point() and tensor.ndim > 2:
            places = prod(n for axis, n in zip(labels, tensor.shape, strict=True) if axis in PLACES)
            each = 1 if PLACES & set(labels) else None
            parts.append(Part(name, places, tensor[0].numel() // places, each))
    return parts


def defaults(hidden_dim: int) -> list[Capacity]:
    """Every registered memory with its default options."""
    return [capacity(kind, hidden_dim) for kind in MEMORIES]


def designs() -> dict[str, Capacity]:
    """The two memories of "MM-Rec Memory Architecture" at its sizes (docs/coverage.md).

    The source gives no model width and no block length; here they are 4096 and 64. Level 1 of the design
    covers a sequence of 32K tokens. The prototype stores keys and values of width 512 each, so a slot is
    twice as wide as by default.
    """
    return {
        "design": capacity("hds", 4096, "MM-Rec design, 7B", num_blocks=32_768 // 64),
        "prototype": capacity("ring", 4096, "MM-Rec prototype, 100M", slot_dim=1024),
    }


def table(capacities: Sequence[Capacity]) -> str:
    """A Markdown table with one row for each part of each memory."""
    head = ["memory", "part", "places", "width", "values", "tokens", "of a million"]
    head += ["bytes of the whole state"]
    rows = []
    for held in capacities:
        for i, part in enumerate(held.parts):
            tokens = part.tokens
            rows.append(
                ["" if i else held.name, part.name]
                + [f"{part.places:,}", f"{part.width:,}", f"{part.values:,}"]
                + ([f"{tokens:,}", f"{tokens / MILLION:.2%}"] if tokens else ["all", "–"])
                + ["" if i else size(held.nbytes)]
            )
    return markdown(head, rows)


def size(count: int) -> str:
    """Format a number of bytes, exact and in decimal units (kB, MB, GB)."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count:,} ({count / 10**power:.3g} {unit})"
    return f"{count:,}"


def page() -> str:
    """The text of docs/capacity.md."""
    hidden_dim = Config().model.hidden_dim
    return f"""# Capacity of the memories

Written by `memlib capacity --out docs/capacity.md` from the memories' states; do not edit. Each row is the
state of one stream, for one layer or for all layers that share it (`memory.memory_sharing`). This page
counts capacity. It does not measure recall: the README's tables and the diary do.

**places** is the number of slots, blocks or pairs that store content; **width** is the number of values in
one. **tokens** counts a place as one token, and a block or a summary as the tokens it averages. A bank mixes
all tokens that are written to one slot, so for a bank this number is neither guaranteed nor a limit. A ring,
a store and pairs keep each token separately. The **whole state** includes counters, which are integers; its
real numbers are float32 whatever the type of the weights.

## Default sizes

Every memory with its default options in a model of the default width, {hidden_dim}.

{table(defaults(hidden_dim))}

External memory can keep its pairs in a store on disk instead (`attach_stores`). A store holds up to twice its
capacity in rows before it deletes evicted rows. Every model also keeps the open window: up to
`model.segment_length` tokens of keys and values in every layer.

## Sizes of "MM-Rec Memory Architecture"

The design and the prototype of that source ([coverage.md](coverage.md)). It gives no model width and no block
length; this table assumes 4,096 and 64 tokens, and enough blocks for 32K tokens. Keys and values of the
prototype have width 512 each, twice the default.

{table(list(designs().values()))}
"""
