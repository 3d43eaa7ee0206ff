"""Options of training on several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlib.config.fields import option


@dataclass(kw_only=True)
class ParallelConfig:
    """How one model is trained by many processes, one for each GPU; a launcher such as torchrun starts them.

    The processes of a run are `pipeline_parallel_size` x data-parallel ranks x `tensor_parallel_size`. The
    rows of a batch are divided among the data-parallel ranks.
    """

    distributed_strategy: Literal["ddp", "fsdp", "hsdp"] = option(
        "ddp",
        "what each data-parallel rank holds. ddp: the whole model; fsdp: its share of every parameter, "
        "gradient and optimizer state; hsdp: the same among `shard_size` ranks, the whole in each such group",
    )
    num_gpus: int | None = option(
        None, "processes of the run, checked against the launcher's; null: as many as it starts", 1
    )
    tensor_parallel_size: int = option(
        1, "processes that share the attention heads and the feed-forward of every layer", 1
    )
    pipeline_parallel_size: int = option(1, "stages that the layers are divided into", 1)
    shard_size: int | None = option(None, "with hsdp: ranks that hold one model together", 1)
    reshard_after_forward: bool = option(
        False,
        "with fsdp and hsdp: give gathered parameters back after each segment's forward pass and gather them "
        "again for the backward pass, which saves memory and costs messages",
    )
    sequence_parallel: bool = option(
        False, "with tensor parallelism: divide the tokens of the norms and the residual stream too"
    )
    loss_parallel: bool = option(
        False, "with tensor parallelism: divide the output layer and the loss by vocabulary"
    )
    expert_parallel: bool = option(
        False, "divide the chapters of learned tokens among the data-parallel ranks, and send queries to them"
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved"] = option(
        "1f1b", "order of forward and backward passes; interleaved: two stages a process"
    )
    pipeline_microbatches: int = option(4, "parts of the rows that follow each other in the pipeline", 1)
    mixed_precision: Literal["none", "bf16", "fp16"] = option(
        "none",
        "type of weights and activations in forward and backward passes. The optimizer's weights, gradients "
        "once summed, memory states and softmaxes stay float32; fp16 scales the loss",
    )
