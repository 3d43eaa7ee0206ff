"""What each memory can hold, computed from the memories themselves, beside what the documents say (C6).

Nothing is allocated: a memory is built on the meta device and its `init_state` asked for one stream's
state. Bytes are of that state, its counters included; places and values are of what stores content.
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


@dataclass(frozen=True)
class Part:
    """Places that hold content: how many, the values in each, the tokens that one stands for (None: all)."""

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
    """One stream's state of one memory; sizes in bytes, at 4 and at 2 bytes a value."""

    name: str
    parts: list[Part]
    float32: int
    bfloat16: int

    def part(self, name: str) -> Part:
        (found,) = (part for part in self.parts if part.name == name)
        return found


def capacity(kind: str, hidden_dim: int, name: str = "", **options: Any) -> Capacity:
    """A registered memory of a model of this width, heads of 64; options as its configuration has them.

    Raises ConfigError for an unknown memory and for options that do not fit.
    """
    changes = {"model.hidden_dim": hidden_dim, "model.num_heads": hidden_dim // 64, "memory.kinds": [kind]}
    changes |= {f"memory.{kind}.{option}": value for option, value in options.items()}
    config = getattr(override(Config(), changes).memory, kind)
    with torch.device("meta"):
        memory = MEMORIES[kind](config, hidden_dim)
        state = memory.init_state(1)
        small = memory.to(torch.bfloat16).init_state(1)
    return Capacity(name or kind, parts_of(state, config), state.nbytes, small.nbytes)


def parts_of(state: State, config: Any) -> list[Part]:
    """What of a state holds content: of a memory that is not named here, all [b … e] of real numbers."""
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
    if isinstance(state, ChapterState):  # what it knows is learned; a stream only says where it is
        summary, recent = state.summary, state.recent
        parts = [Part("last segment, mean", 1, summary.shape[1], None)]
        return parts + [Part("recent tokens", *recent.shape[1:])] * bool(recent.shape[1])
    if isinstance(state, ExternalState):
        h, c, k = state.keys.shape[1:]
        return [Part("pairs", c, 2 * h * k)]
    return [
        Part(name, prod(tensor.shape[1:-1]), tensor.shape[-1])
        for name, tensor in state.named_tensors()
        if tensor.is_floating_point() and tensor.ndim > 2
    ]


def defaults(hidden_dim: int) -> list[Capacity]:
    """Every registered memory as it comes."""
    return [capacity(kind, hidden_dim) for kind in MEMORIES]


def designs() -> dict[str, Capacity]:
    """The two memories of the MM-Rec document: its design, and the prototype that was running.

    The document names no model width; 4096 is that of the plan's bank. The design's sequences are of
    32K tokens, which level 1 holds in blocks of 64. The prototype's [512, 512] are keys and values each,
    so an item is twice as wide as this package's default.
    """
    return {
        "design": capacity("hds", 4096, "MM-Rec design, 7B", num_blocks=32_768 // 64),
        "prototype": capacity("ring", 4096, "MM-Rec prototype, 100M", slot_dim=1024),
    }


def table(capacities: Sequence[Capacity]) -> str:
    """A row for each part of each memory."""
    head = ["memory", "part", "places", "width", "values", "tokens", "of a million"]
    head += ["whole state, fp32", "bf16"]
    rows = []
    for held in capacities:
        for i, part in enumerate(held.parts):
            tokens = part.tokens
            rows.append(
                ["" if i else held.name, part.name]
                + [f"{part.places:,}", f"{part.width:,}", f"{part.values:,}"]
                + ([f"{tokens:,}", f"{tokens / MILLION:.2%}"] if tokens else ["all", "–"])
                + (["", ""] if i else [size(held.float32), size(held.bfloat16)])
            )
    return markdown(head, rows)


def size(count: int) -> str:
    """Bytes as they are, and in units of a thousand: those the documents use."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count:,} ({count / 10**power:.3g} {unit})"
    return f"{count:,}"


def slips() -> str:
    """What the documents say of capacity, what comes out, and where they slipped."""
    made = designs()
    level_3, level_1 = made["design"].part("level 3, banks"), made["design"].part("level 1, blocks")
    ring, store = made["prototype"].parts
    both = ring.places + store.places
    working = level_1.tokens or 0
    full, factors, reduced = (
        sum(torch.empty(shape, device="meta").numel() for shape in shapes)
        for shapes in ([(4096, 4096)], [(4096, 512), (4096, 512)], [(4096, 512)])
    )
    share = f"{level_3.places / MILLION:.2%} against {both / MILLION:.2%}"
    in_values = (ring.values + store.values) / level_3.values
    rows = [
        ["persistent places of the design", "8 × 1,024 = 8,192", f"{level_3.places:,}", "right"],
        ["places of the prototype", "512 + 512 = 1,024", f"{both:,}", "right"],
        [
            "of a million tokens",
            "0.8 % against 0.1 %",
            share,
            f"right, rounded; of 2²⁰ tokens {level_3.places / 2**20:.2%} and {both / 2**20:.2%}. A place is "
            "counted as a token, which no bank that mixes promises",
        ],
        [
            "the prototype's part of the design",
            "~12 %, 8× less",
            f"{both / level_3.places:.1%} of the places",
            f"right for places; of the values it is {in_values:.0%}, since its items have a key beside "
            "the value and a slot has not",
        ],
        [
            "the prototype with a batch of 16",
            "16 × 512 = 8,192 tokens, 0.8 %",
            f"{both:,} tokens a stream",
            "slip: those are the tokens under way in 16 separate streams. A stream remembers no more "
            "for having neighbours",
        ],
        [
            "tokens of the design in all",
            "32K + 8K = 40,192",
            f"{working:,} + {level_3.places:,} = {working + level_3.places:,}",
            f"slip: 32,000 + 8,192. 32K is {working:,}, as 8K is 8,192; in round thousands it is 40,000",
        ],
        [
            "levels 0 to 2",
            "up to 32K tokens",
            f"{level_1.places} blocks of {level_1.tokens_each}",
            "not as tokens: level 1 holds means of blocks; level 0 is the token itself and holds none",
        ],
        [
            "learnable bank, 4096 × 4096",
            "67M params",
            f"{full:,} parameters, {size(4 * full)} in fp32",
            "slip: 67M is the bytes",
        ],
        [
            "factorised, rank 512",
            "4.2M params, 16× less",
            f"{factors:,} parameters, {full / factors:.0f}× less",
            "slip: 16× compares with the bytes",
        ],
        [
            "reduced, width 512",
            "2.1M params, 32× less",
            f"{reduced:,} parameters, {full / reduced:.0f}× less",
            "slip: 32× compares with the bytes",
        ],
    ]
    return markdown(["what", "the document", "computed", "verdict"], rows)


def page() -> str:
    """docs/capacity.md."""
    hidden_dim = Config().model.hidden_dim
    return f"""# What the memories can hold

Written by `memlib capacity --out docs/capacity.md` from the memories' own states; do not edit. One stream's
state of one layer, or of all layers that share it (`memory.memory_sharing`). Nothing is measured here: what a
memory *recalls* of what it holds is in the README's tables and in the diary.

**places** are what content is written to, **width** the values in one. **tokens** counts a place as one
token, a block or a summary as the tokens it is the mean of. A bank mixes what is written to one slot, so its
tokens are neither a promise nor a limit; a ring, a store and pairs keep each token as it was. The **whole
state** has counters too, which are integers.

## As they come

Every memory with its defaults in a model of the default width, {hidden_dim}.

{table(defaults(hidden_dim))}

The external memory may have a store instead (`attach_stores`): the same pairs, on disk, and up to twice the
capacity in rows before the evicted ones are dropped. All of them add the open window, up to
`model.segment_length` tokens of every layer's keys and values.

## As the documents have them

The MM-Rec document's design and prototype, at its own sizes. It does not say how wide the model or how long
a block is: 4,096 and 64 tokens are assumed, and as many blocks as 32K tokens make. Keys and values of the
prototype are 512 wide each, twice this package's default.

{table(list(designs().values()))}

## The documents' arithmetic

{slips()}

The first seven rows are the MM-Rec document's, the last three the Implementation Plan's.
"""
