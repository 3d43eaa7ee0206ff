"""Tensor parallelism: ranks share the heads and the feed-forward of every layer; memories are whole on each.

The maps into heads and into the feed-forward are divided by their outputs, the maps out of them by their
inputs, so that a layer's ranks meet twice: after the attention and after the feed-forward.

With sequence parallelism a rank holds n / ranks tokens of the residual stream. They are gathered after each
norm and divided again where a sum enters the stream; between the two all is as without. So memories see
whole segments, and their gradients are whole.

With loss parallelism the output layer and its logits are divided by vocabulary (`VocabularyLoss`).

Everything is applied from outside, by modules' hooks and by torch's styles of parallel layers.
Source: Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv 2205.05198 (sequences).

Axes: b batch, n tokens, d features, v vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

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
        block.attention.num_heads //= mesh.size()
    if parallel.loss_parallel:
        parallelize_module(model.head, mesh, ColwiseParallel())
        model.head.register_forward_hook(partial(whole_in_evaluation, mesh))
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
    if parallel.sequence_parallel and config.model.dropout:
        raise ConfigError(
            f"parallel.sequence_parallel: model.dropout = {config.model.dropout} draws for whole rows, and a "
            "rank has a part of their tokens; set one of the two to 0 or false"
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


def whole_in_evaluation(mesh: DeviceMesh, head: nn.Module, inputs: object, logits: Tensor) -> Tensor:
    """Logits are divided in training only."""
    if head.training:
        return logits
    return DTensor.from_local(logits, mesh, [Shard(-1)], run_check=False).full_tensor()


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


class VocabularyLoss:
    """`scored_cross_entropy` and `correct` of logits that are divided by vocabulary: [b n v/ranks] on each.

    -log p(y) = log sum_v exp(z_v - m) - (z_y - m) with the largest logit m: three numbers a position travel,
    not the logits.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def cross_entropy(self, logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return _DividedLoss.apply(logits[scored].to(wide), targets[scored], self.group).sum()

    @torch.no_grad()
    def correct(self, logits: Tensor, targets: Tensor, scored: Tensor) -> int:
        best, index = logits[scored].max(-1)
        highest = best.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        first = index + self.group.rank() * logits.shape[-1]
        winner = torch.where(best == highest, first, torch.iinfo(first.dtype).max)
        dist.all_reduce(winner, dist.ReduceOp.MIN, self.group)
        return int((winner == targets[scored]).sum())


class _DividedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        highest = logits.amax(-1, keepdim=True)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        shifted = logits - highest
        weights = shifted.exp()
        total = weights.sum(-1, keepdim=True)
        dist.all_reduce(total, group=group)
        place = targets - group.rank() * logits.shape[-1]
        own = (place >= 0) & (place < logits.shape[-1])
        place = torch.where(own, place, 0).unsqueeze(-1)
        wanted = torch.where(own, shifted.gather(-1, place).squeeze(-1), 0.0)
        dist.all_reduce(wanted, group=group)
        ctx.save_for_backward(weights / total, place, own)
        return total.squeeze(-1).log() - wanted

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probabilities, place, own = ctx.saved_tensors
        found = probabilities.clone().scatter_add_(-1, place, -own.to(probabilities.dtype).unsqueeze(-1))
        return found * gradient.unsqueeze(-1), None, None
