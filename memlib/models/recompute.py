"""Which activations are computed again in the backward pass instead of being kept.

| training.recompute | kept of a block | computed again |
| --- | --- | --- |
| block | its input | all of it, in every n-th block (`recompute_every`) |
| mlp | all but the feed-forward's inside | the feed-forward |
| selective | results of matrix products | everything else |

Gradients are the same. Source: Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv
2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from memlib.config import TrainingConfig

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}

Call = Callable[..., Any]


def recomputed(block: nn.Module, layer: int, training: TrainingConfig) -> Call:
    """A block that keeps fewer activations while it trains; the block itself without checkpointing."""
    if not (training.gradient_checkpointing and block.training):
        return block
    if training.recompute == "block" and layer % training.recompute_every:
        return block
    if training.recompute == "mlp":
        return partial(with_recomputed_mlp, block)
    options: dict[str, Any] = {}
    if training.recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
    return partial(checkpoint, block, use_reentrant=False, **options)


def keep_products(context: Any, operator: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Keep what is dear to compute."""
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def with_recomputed_mlp(block: nn.Module, *inputs: Any) -> Any:
    """The block with its feed-forward under a checkpoint of its own."""
    mlp = cast(nn.Module, block.mlp)
    forward = mlp.forward
    mlp.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        return block(*inputs)
    finally:
        mlp.forward = forward
