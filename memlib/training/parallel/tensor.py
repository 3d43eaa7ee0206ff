"""Tensor parallelism: ranks share the heads and the feed-forward of every layer; memories are whole on each.

The maps into heads and into the feed-forward are divided by their outputs, the maps out of them by their
inputs, so that a layer's ranks meet twice: after the attention and after the feed-forward.

With sequence parallelism a rank holds n / ranks tokens of the residual stream. They are gathered after each
norm and divided again where a sum enters the stream; between the two all is as without. So memories see
whole segments, and their gradients are whole.

With loss parallelism the output layer and its logits are divided by vocabulary (`cross_entropy`).

Everything is applied from outside, by modules' hooks and by torch's styles of parallel layers.
Source: Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv 2205.05198 (sequences).

Axes: b batch, n tokens, d features, v vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

from memlib.config import ConfigError, ParallelConfig
from memlib.models import MemoryTransformer
from memlib.models.block import TransformerBlock
from memlib.models.fusion import ResidualFusion, SoftmaxFusion
from memlib.nn.norm import RMSNorm
from memlib.ops import rms_norm

INTO = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
MLP = ("gate_proj", "up_proj")


def divide_layers(model: MemoryTransformer, parallel: ParallelConfig, mesh: DeviceMesh) -> None:
    """Divide a model's layers among the ranks of a mesh of one axis, in place.

    Raises ConfigError for what cannot be divided.
    """
    check(model, parallel, mesh.size())
    spread = parallel.sequence_parallel
    for module in model.blocks:
        block = cast(TransformerBlock, module)
        summed = isinstance(block.fusion, SoftmaxFusion)  # its sum needs the attention of all tokens
        out = RowwiseParallel(output_layouts=Shard(1) if spread and not summed else Replicate())
        plan: dict[str, Any] = {name: ColwiseParallel() for name in INTO} | {"attention.o_proj": out}
        for mlp in ("mlp", "extra_mlp"):
            if getattr(block, mlp, None) is not None:
                plan |= {f"{mlp}.{name}": ColwiseParallel() for name in MLP}
                plan[f"{mlp}.down_proj"] = RowwiseParallel(output_layouts=Shard(1) if spread else Replicate())
        parallelize_module(block, mesh, plan)
    if parallel.loss_parallel:
        parallelize_module(model.head, mesh, ColwiseParallel(use_local_output=False))
    if spread:
        spread_tokens(model, mesh)


def check(model: MemoryTransformer, parallel: ParallelConfig, size: int) -> None:
    """Raise ConfigError, with the reason, for a model that tensor parallelism cannot divide."""
    config = model.config
    for layer, _, memory in model.stack:
        if memory.in_attention or memory.uses_heads:
            raise ConfigError(
                f"parallel.tensor_parallel_size = {size}: the {type(memory).__name__} of layer {layer} takes "
                "part in the attention, whose heads are divided, with a state of all heads; use a memory "
                "beside the attention, or parallel.distributed_strategy: fsdp"
            )
    if parallel.loss_parallel and config.model.vocab_size % size:
        raise ConfigError(
            f"parallel.loss_parallel: {size} ranks must divide model.vocab_size = {config.model.vocab_size}"
        )
    if parallel.loss_parallel and config.model.tie_embeddings:
        raise ConfigError(
            "parallel.loss_parallel: the output layer would be divided and the embedding not, but "
            "model.tie_embeddings makes them one; set one of the two to false"
        )
    if parallel.sequence_parallel and config.model.segment_length % size:
        raise ConfigError(
            f"parallel.sequence_parallel: {size} ranks must divide model.segment_length = "
            f"{config.model.segment_length}"
        )


def spread_tokens(model: MemoryTransformer, mesh: DeviceMesh) -> None:
    """Keep n / ranks tokens of the residual stream on each rank."""

    def divide(tokens: Tensor) -> Tensor:
        whole = DTensor.from_local(tokens, mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(1)]).to_local()

    def gather(tokens: Tensor) -> Tensor:
        part = DTensor.from_local(tokens, mesh, [Shard(1)], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local()

    def after(change: Any) -> Any:
        return lambda module, inputs, output: change(output)

    for norm in (*(part for block in model.blocks for part in block.children()), model.norm):
        if isinstance(norm, RMSNorm):
            norm.forward = partial(norm_of_part, norm, mesh.get_group())  # type: ignore[method-assign]
            norm.register_forward_hook(after(gather))
    model.embedding.register_forward_hook(after(divide))
    for fusion in model.modules():
        if isinstance(fusion, SoftmaxFusion):
            fusion.register_forward_hook(after(divide))
        if isinstance(fusion, ResidualFusion):
            for project in fusion.o_proj:
                project.register_forward_hook(after(divide))


def norm_of_part(norm: RMSNorm, group: dist.ProcessGroup, hidden: Tensor) -> Tensor:
    """A norm of some of the tokens; its weight's gradient is summed over the ranks that have the others."""
    return rms_norm(hidden, _SumGradient.apply(norm.weight, group), norm.eps)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def cross_entropy(logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """`scored_cross_entropy` of logits [b n v] that may be divided by vocabulary, equal on all ranks.

    Its backward pass must run inside `loss_parallel()` too.
    """
    wanted = torch.where(scored, targets, -100)
    wide = torch.promote_types(logits.dtype, torch.float32)
    with loss_parallel():
        return F.cross_entropy(
            logits.to(wide).flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
        )


@torch.no_grad()
def correct(logits: DTensor, targets: Tensor, scored: Tensor) -> int:
    """`scoring.correct` of logits that are divided by vocabulary: the best of every rank's best."""
    mine, mesh = logits.to_local(), logits.device_mesh
    best, index = mine[scored].double().max(-1)
    index = index + mesh.get_local_rank() * mine.shape[-1]
    own = torch.stack((best, index.double()))
    found = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(found, own, group=mesh.get_group())
    everyone = torch.stack(found)  # rank, (best, index), position
    winner = everyone[:, 0].argmax(0, keepdim=True)
    return int((everyone[:, 1].gather(0, winner)[0].long() == targets[scored]).sum())
