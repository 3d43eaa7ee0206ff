"""Make one process's part of a model out of the whole: shards of its parameters, in the types it computes in.

One code path serves all of data parallelism: `fully_shard` for each block over the mesh (replicate, shard).
With shards of the whole model, ddp, it only sums gradients. torch's own DDP wrapper is not used: it waits for
the gradient of every parameter, which the last write of a truncated memory never gets.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from memlib.config import ConfigError, ParallelConfig
from memlib.models import MemoryTransformer
from memlib.tasks.scoring import correct, scored_cross_entropy
from memlib.training.parallel.experts import divide_chapters
from memlib.training.parallel.pipeline import Pipeline
from memlib.training.parallel.ranks import Ranks
from memlib.training.parallel.tensor import VocabularyLoss, divide_layers

DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def distribute(model: MemoryTransformer, parallel: ParallelConfig, ranks: Ranks) -> MemoryTransformer:
    """This process's part of a model, in place: the model itself, or a `Pipeline`, which is called like it.

    Its optimizer must be built afterwards.
    """
    if ranks.mesh is None:
        return model
    for layer, _, memory in model.stack:
        if ranks.data_size > 1 and getattr(memory.config, "exploration", False):
            raise ConfigError(
                f"the {type(memory).__name__} of layer {layer} explores with noise of the whole batch, and "
                f"{ranks.data_size} ranks would each draw their own; set its exploration to 0"
            )
    parts: list[Any] = [model]
    whole: Any = model
    if ranks.size("stage") > 1:
        whole = Pipeline(model, ranks)
        parts = whole.stages
    for module in whole.modules():
        if hasattr(module, "batch_sum"):
            module.batch_sum = SumOverRows(ranks)
    if ranks.size("tensor") > 1:
        divide_layers(model, parallel, ranks.mesh["tensor"])
    owned = set[nn.Parameter]()
    if parallel.expert_parallel:
        owned = divide_chapters(model, ranks, DTYPES[parallel.mixed_precision])
    if ranks.data_size > 1 or parallel.mixed_precision != "none":
        for part in parts:
            shard(part, parallel, ranks, owned)
    return cast(MemoryTransformer, whole)


def shard(part: Any, parallel: ParallelConfig, ranks: Ranks, owned: set[nn.Parameter]) -> None:
    """Divide the parameters of a model or stage among the data-parallel ranks, block by block.

    owned: parameters that are divided already (`divide_chapters`).
    """
    assert ranks.mesh is not None
    # States come in float32 and are cast where they are read (`LayerMemories.open`): a policy that cast the
    # inputs of a block would round what a memory keeps.
    dtype = DTYPES[parallel.mixed_precision]
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    # Nothing here changes an output in place, which is what it warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    axes: Any = ("replicate", "shard") if ranks.size("replicate") > 1 else "shard"
    options: dict[str, Any] = {"mesh": ranks.mesh[axes], "mp_policy": policy, "ignored_params": owned}
    blocks = list(part.blocks.children())
    for module in shared_modules(blocks, owned):  # a group of their own, which stays gathered
        fully_shard(module, reshard_after_forward=False, **options)
    for block in blocks:
        fully_shard(block, reshard_after_forward=parallel.reshard_after_forward, **options)
    fully_shard(part, reshard_after_forward=parallel.reshard_after_forward, **options)


def loss_of(parallel: ParallelConfig, ranks: Ranks) -> tuple[Callable[..., Tensor], Callable[..., int]]:
    """The loss of logits in this layout, and their number of correct predictions."""
    if ranks.mesh is None or not parallel.loss_parallel:
        return scored_cross_entropy, correct
    loss = VocabularyLoss(ranks.mesh.get_group("tensor"))
    return loss.cross_entropy, loss.correct


def shared_modules(blocks: list[nn.Module], owned: set[nn.Parameter]) -> list[nn.Module]:
    """Modules whose parameters several blocks use, such as chapters' learned tokens."""
    used = Counter(id(p) for block in blocks for p in set(block.parameters()))
    owners = {
        id(module): module
        for block in blocks
        for module in block.modules()
        for p in module.parameters(recurse=False)
        if used[id(p)] > 1 and p not in owned
    }
    return list(owners.values())


class SumOverRows:
    """A `batch_sum` over the data-parallel ranks. Each rank then holds the whole batch's loss.

    The gradient passes unchanged: gradients of parameters are summed over the ranks afterwards.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, total: Tensor) -> Tensor:
        return _Sum.apply(total, self.ranks)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, ranks: Ranks) -> Tensor:
        return ranks.all_reduce(total.clone(), ["replicate", "shard"])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
