"""What the shards of a checkpoint hold, for comparison."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

Shards = dict[tuple[str, tuple[int, ...]], Tensor]


def tensors(checkpoint: Path) -> Shards:
    """Every shard by name and place, whichever file it is in: a tensor of several ranks is in any one's."""
    found: Shards = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            places = json.loads(stored.metadata()["DCP_SHARDING_INFO"])
            for name in stored.keys():  # noqa: SIM118, not a mapping
                found[name, tuple(places[name]["saved_offsets"])] = stored.get_tensor(name)
    return found


def same(mine: Shards, theirs: Shards) -> list[str]:
    """Names of shards that only one of two checkpoints has, or that differ in any bit."""
    both = mine.keys() & theirs.keys()
    differ = {key for key in both if not torch.equal(mine[key], theirs[key])}
    return sorted({name for name, _ in differ | (mine.keys() ^ theirs.keys())})
