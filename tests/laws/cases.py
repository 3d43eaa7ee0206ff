"""Every architecture the registry offers, as a tiny model in float64.

No memory is named here. A memory that is registered (its file, its dataclass and field in
`memlib.config`, its line in `MEMORIES`) is a case in each variant its dataclass offers as a `Literal`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from memlib import config as configuration
from memlib.config import Config, ModelConfig
from memlib.memory import MEMORIES
from memlib.models import MemoryTransformer

SEGMENT, VOCAB, BATCH = 4, 17, 3
SMALL = {  # sizes by field name, in any memory's dataclass
    "num_slots": 8,
    "num_heads": 2,
    "num_memories": 2,
    "mem_dim": 6,
    "address_dim": 4,
    "chunk_size": 3,
    "num_blocks": 2,
    "capacity": 12,
    "top_k": 3,
    "short_slots": 3,
    "long_slots": 4,
    "slot_dim": 16,
    "reclaim_after": 2,
    "num_memory_tokens": 8,
    "use_low_rank_memory": True,
    "memory_rank": 4,
    "num_chapters": 4,
    "top_k_chapters": 2,
    "routing_window_size": 6,
    "load_balance_coefficient": 0.0,  # else a piece without answers has a gradient too
}

SHARINGS = ("shared", "per_layer", "every_k_layers")
FUSIONS = {
    "residual_A": {"fusion": "residual", "memory_block_variant": "A"},
    "residual_B": {"fusion": "residual", "memory_block_variant": "B"},
}
MANY_COMBINATIONS = 8  # a memory with more shows every two choices together, not all
MANY_VARIANTS = 4  # a memory with more meets the sharings and fusions in turn, the first variant all


@dataclass(frozen=True, eq=False)
class Case:
    """One architecture: `memory` holds MemoryConfig's options, `kinds` those of each memory."""

    name: str
    memory: dict[str, Any]
    kinds: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        return self.name

    def config(self, **memory: Any) -> Config:
        parts = {kind: memory_config(kind)(**options) for kind, options in self.kinds.items()}
        return Config(
            model=ModelConfig(
                hidden_dim=16,
                num_heads=2,
                num_layers=3,
                intermediate_dim=24,
                vocab_size=VOCAB,
                segment_length=SEGMENT,
            ),
            memory=configuration.MemoryConfig(kinds=list(self.kinds), **parts, **self.memory, **memory),
        )

    def fresh(self, **memory: Any) -> MemoryTransformer:
        """The model as training would start it; `memory` overrides MemoryConfig's options."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MemoryTransformer(self.config(**memory)).double().eval()

    def build(self) -> MemoryTransformer:
        """The model with every parameter moved off its start: always the same weights."""
        return stir(self.fresh())


@torch.no_grad()
def stir(model: MemoryTransformer, size: float = 0.3) -> MemoryTransformer:
    """Add noise to every parameter: gates and output maps that start at zero would hide what is wrong."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def carries(config: Config) -> bool:
    """Whether something said in one segment can reach a later one."""
    return any(getattr(config.memory, kind).carries for kind in config.memory.kinds)


def memory_config(kind: str) -> type:
    """The dataclass of a registered memory."""
    return get_type_hints(configuration.MemoryConfig)[kind]


def variants(kind: str) -> list[dict[str, Any]]:
    """Options for the choices a memory's dataclass offers, in small sizes: every combination of them, or,
    where these are many, as many as it takes to have each two choices together."""
    hints = get_type_hints(memory_config(kind))
    sizes = {name: value for name, value in SMALL.items() if name in hints}
    choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    picks = list(itertools.product(*choices.values()))
    if len(picks) > MANY_COMBINATIONS:
        picks = pairwise(picks)
    return [sizes | dict(zip(choices, picked, strict=True)) for picked in picks]


def pairwise(picks: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of all combinations, few that still show every two choices of two options together; the first stays."""
    missing = set().union(*map(pairs_of, picks))
    chosen, rest = [], list(picks)
    while missing:
        best = max(rest, key=lambda pick: (not chosen and pick is picks[0], len(missing & pairs_of(pick))))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pairs_of(pick: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
    return set(itertools.combinations(enumerate(pick), 2))


def cases() -> list[Case]:
    """The baseline; each memory in each variant, sharing and fusion; all memories in one model."""
    found = [BASELINE]
    for kind in MEMORIES:
        for i, options in enumerate(variants(kind)):
            every = i == 0 or len(variants(kind)) <= MANY_VARIANTS
            chosen = "-".join([kind, *(v for v in options.values() if isinstance(v, str))])
            kinds = {kind: options}
            around = {s: {"memory_sharing": s} for s in SHARINGS}
            if not memory_config(kind)(**options).in_attention:  # the attention has no residual branch
                around |= FUSIONS
            turn = list(around)[i % len(around)]
            picked = [name for name in around if every or name in ("per_layer", turn)]
            found += [Case(f"{chosen}-{name}", around[name], kinds) for name in picked]
        gap = {"memory_layer_placement": "custom", "memory_layer_custom": [0, 2]}
        found.append(Case(f"{kind}-layers_0_2", gap, {kind: variants(kind)[0]}))
    if len(MEMORIES) > 1:
        together = {kind: variants(kind)[0] for kind in MEMORIES}
        found += [Case(f"all-{s}", {"memory_sharing": s}, together) for s in SHARINGS]
        found += [Case(f"all-{name}", fusion, together) for name, fusion in FUSIONS.items()]
    return found


BASELINE = Case("baseline", {}, {})


def has_field(kind: str) -> bool:
    """Whether `MemoryConfig` has the field a registered memory is configured by."""
    return kind in [f.name for f in fields(configuration.MemoryConfig)]
