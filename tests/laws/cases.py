"""Every architecture the registry offers, as a tiny model.

No memory is named here. A memory that is registered (its file, its dataclass and field in
`memlib.config`, its line in `MEMORIES`) is a case in each variant its dataclass offers as a `Literal`, in
the sizes its options give as `small`. Cases are in float64, where a difference is a fault and not rounding;
`in_float32` gives the same cases as models are used.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from memlib import config as configuration
from memlib.config import Config, ModelConfig
from memlib.memory import MEMORIES
from memlib.models import MemoryTransformer

SEGMENT, VOCAB, BATCH = 4, 17, 3
SHARINGS = ("shared", "per_layer", "every_k_layers")
FUSIONS = {
    "residual_A": {"fusion": "residual", "memory_block_variant": "A"},
    "residual_B": {"fusion": "residual", "memory_block_variant": "B"},
}
MANY_COMBINATIONS = 8  # a memory with more shows every two choices together, not all
MANY_VARIANTS = 4  # a memory with more meets the sharings and fusions in turn, the first variant all


@dataclass(frozen=True, eq=False)
class Case:
    """One architecture: `memory` holds MemoryConfig's options, `kinds` those of each memory; window: of the
    attention."""

    name: str
    memory: dict[str, Any]
    kinds: dict[str, dict[str, Any]]
    dtype: torch.dtype = torch.float64
    layers: int = 3
    window: int | None = None

    def __str__(self) -> str:
        return self.name

    def config(self, **memory: Any) -> Config:
        parts = {kind: memory_config(kind)(**options) for kind, options in self.kinds.items()}
        return Config(
            model=ModelConfig(
                hidden_dim=16,
                num_heads=2,
                num_layers=self.layers,
                intermediate_dim=24,
                vocab_size=VOCAB,
                segment_length=SEGMENT,
                attention_window=self.window,
            ),
            memory=configuration.MemoryConfig(kinds=list(self.kinds), **parts, **self.memory, **memory),
        )

    def fresh(self, **memory: Any) -> MemoryTransformer:
        """The model as training would start it; `memory` overrides MemoryConfig's options."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MemoryTransformer(self.config(**memory)).to(self.dtype).eval()

    def build(self) -> MemoryTransformer:
        """The model with every parameter moved off its start: always the same weights."""
        return stir(self.fresh())


@torch.no_grad()
def stir(model: nn.Module, size: float = 0.3, seed: int = 1) -> Any:
    """Add noise to every parameter: gates and output maps that start at zero would hide what is wrong."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def carries(config: Config, training: bool = False) -> bool:
    """Whether something said in one segment can reach a later one, in use or in training."""
    options = [getattr(config.memory, kind) for kind in config.memory.kinds]
    return any(one.carries_in_training if training else one.carries for one in options)


def memory_config(kind: str) -> type:
    """The dataclass of a registered memory."""
    return get_type_hints(configuration.MemoryConfig)[kind]


def small_options(kind: str) -> dict[str, Any]:
    """A memory's options that have a small value for tests, with these values."""
    return {f.name: f.metadata["small"] for f in fields(memory_config(kind)) if "small" in f.metadata}


def without_small_value(kind: str) -> list[str]:
    """The integer options of a memory that have no small value. Options in groups of their own need none."""
    hints = get_type_hints(memory_config(kind))
    integers = [name for name, hint in hints.items() if int in (hint, *get_args(hint))]
    return [name for name in integers if name not in small_options(kind)]


def variants(kind: str) -> list[dict[str, Any]]:
    """Options for the choices a memory's dataclass offers, in small sizes: every combination of them, or,
    where these are many, as many as it takes to have each two choices together."""
    hints = get_type_hints(memory_config(kind))
    sizes = small_options(kind)
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
    """The baseline; each memory in each variant, sharing and fusion; all memories in one model; the first and
    the last with a sliding window too.

    Two layers, or three where the layers are not alike: one of two that share, or one without the memory.
    """

    def case(name: str, memory: dict[str, Any], kinds: dict[str, dict[str, Any]]) -> Case:
        uneven = memory.get("memory_sharing") == "every_k_layers" or "memory_layer_custom" in memory
        return Case(name, memory, kinds, layers=3 if uneven else 2)

    found = [BASELINE, replace(BASELINE, name="baseline-window", window=2)]
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
            found += [case(f"{chosen}-{name}", around[name], kinds) for name in picked]
        gap = {"memory_layer_placement": "custom", "memory_layer_custom": [0, 2]}
        found.append(case(f"{kind}-layers_0_2", gap, {kind: variants(kind)[0]}))
    if len(MEMORIES) > 1:
        together = {kind: variants(kind)[0] for kind in MEMORIES}
        found += [case(f"all-{s}", {"memory_sharing": s}, together) for s in SHARINGS]
        found += [case(f"all-{name}", fusion, together) for name, fusion in FUSIONS.items()]
        found.append(replace(found[-1], name="all-window", window=2))
    return found


def in_float32(case: Case) -> Case:
    """The same architecture in float32."""
    return replace(case, name=f"{case.name}-float32", dtype=torch.float32)


BASELINE = Case("baseline", {}, {})


def without_memory(case: Case) -> Case:
    """The baseline in a case's type and number of layers."""
    return replace(BASELINE, dtype=case.dtype, layers=case.layers, window=case.window)


def has_field(kind: str) -> bool:
    """Whether `MemoryConfig` has the field a registered memory is configured by."""
    return kind in [f.name for f in fields(configuration.MemoryConfig)]
