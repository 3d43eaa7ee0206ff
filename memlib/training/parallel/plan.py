"""Estimate the memory that one rank of a training run needs, without its GPUs and without its bytes.

The model is built from fake tensors, which have shapes and types but no content, and divided by the same
code that trains it, over a fake process group of as many ranks as asked for. One or two parts of `horizon`
segments pass forward and backward. All tensors that live at the same time are counted (`Allocations`). A
second part begins, as in training, with gradients and with the memory that the first has written.

At the largest moment of an optimizer step a rank holds

    weights + gradients + optimizer state + gathered parameters + memory state + activations

and in the update itself weights, gradients, optimizer state, memory state and temporaries of the update.

Not counted: what an operator allocates inside itself, fragmentation of CUDA's allocator, the CUDA context and
the buffers of NCCL (together often 1 to 3 GiB), and the building of the model, which is whole on each rank
before it is divided. Operators are those of the CPU. With tensor or pipeline parallelism the bytes of
parameters are exact, and activations are those of an undivided model: an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from memlib.config import Config, ConfigError, override
from memlib.evaluation.table import markdown
from memlib.models import MemoryState, MemoryTransformer, ModelOutput
from memlib.models.info import format_params
from memlib.tasks import make_task
from memlib.tasks.scoring import scored_cross_entropy
from memlib.training.parallel import pipeline, tensor
from memlib.training.parallel.allocations import Allocations, local_bytes
from memlib.training.parallel.apply import distribute
from memlib.training.parallel.pipeline import layers_of
from memlib.training.parallel.ranks import Ranks, check_launch, make_mesh

GIB = 2**30
REMEDIES = {
    "weights": "parallel.distributed_strategy=fsdp, or more ranks",
    "gradients": "parallel.distributed_strategy=fsdp, or more ranks",
    "optimizer": "parallel.distributed_strategy=fsdp, or more ranks",
    "gathered": "parallel.reshard_after_forward=true, parallel.mixed_precision=bf16",
    "state": "fewer rows a rank, or a smaller memory",
    "update": "parallel.distributed_strategy=fsdp, or more ranks",
}


@dataclass(frozen=True)
class Plan:
    """What one rank of a run needs; all sizes in bytes.

    parameters: numbers, by group; rows: of one rank; tokens: of a row that pass between two backward passes;
    held: by kind, at the largest moment of forward and backward; update: the same at the optimizer's update;
    measured: whether activations are those of this layout, or of an undivided model, an upper bound.
    """

    ranks: int
    rows: int
    tokens: int
    parameters: dict[str, int]
    held: dict[str, int]
    update: dict[str, int]
    measured: bool
    limit: int

    @property
    def peak(self) -> int:
        return max(sum(self.held.values()), sum(self.update.values()))

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def largest(self) -> str:
        """The largest kind at the larger of the two moments."""
        at = max(self.held, self.update, key=lambda held: sum(held.values()))
        return max(at, key=lambda kind: at[kind])


def make_plan(config: Config, ranks: int, memory_gib: float = 80.0) -> Plan:
    """The memory of one of `ranks` processes of a run.

    Raises ConfigError where the run itself would, and for memories that look at values of tensors.
    """
    parallel, training = config.parallel, config.training
    check_launch(config, ranks)
    divided = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    data = ranks // divided
    if parallel.expert_parallel:
        raise ConfigError(
            "parallel.expert_parallel: how many queries a rank receives depends on the router, which has no "
            "values here; plan with parallel.expert_parallel=false, where a rank also gathers all chapters"
        )
    alone = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "num_gpus": None}
    alone |= {"sequence_parallel": False, "loss_parallel": False}
    changes = {f"parallel.{name}": value for name, value in alone.items()} | {"training.device": "cpu"}
    share = largest_share(config) if divided > 1 else 1.0  # first, as it may refuse
    scored = scored_positions(config, data)
    with fake_ranks(override(config, changes), data) as (at, model):
        held, optimizer, largest = measure(model, at, scored)
        parameters = count_by_group(model)
    held["optimizer"] = optimizer
    for kind in ("weights", "gradients", "optimizer", "gathered"):
        held[kind] = round(held[kind] * share)
    fixed = {kind: held[kind] for kind in ("weights", "optimizer", "state")}
    # AdamW's update of all parameters at once, on CUDA; the norm in float64 of the largest one.
    update = fixed | {"gradients": held["optimizer"] // 2, "update": max(held["weights"], largest)}
    return Plan(
        ranks=ranks,
        rows=training.batch_size // data,
        tokens=part_segments(config) * config.model.segment_length,
        parameters=parameters,
        held={kind: held[kind] for kind in KINDS},
        update=update,
        measured=divided == 1,
        limit=round(memory_gib * GIB),
    )


KINDS = ("weights", "gradients", "optimizer", "gathered", "state", "activations")


@contextmanager
def fake_ranks(config: Config, world: int) -> Iterator[tuple[Ranks, MemoryTransformer]]:
    """A fake process group, and the model of its first rank from fake tensors.

    Raises RuntimeError inside a run of several processes.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group is open: plan a run in a process of its own")
    cpu = torch.device("cpu")
    if world == 1 and config.parallel.mixed_precision == "none":
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield Ranks(cpu), MemoryTransformer(config)
        return
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        ranks = Ranks(cpu, make_mesh(config, cpu, world))  # a mesh reads values: real tensors
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield ranks, distribute(MemoryTransformer(config), config.parallel, ranks)
    finally:
        dist.destroy_process_group()


def measure(model: MemoryTransformer, ranks: Ranks, scored: int) -> tuple[dict[str, int], int, int]:
    """Bytes by kind at the largest moment, bytes of the optimizer's state, and of the norm's temporaries.

    scored: positions of a part with a loss, in all rows of this rank.
    """
    config = model.config
    training = config.training
    rows = training.batch_size // ranks.data_size
    model.train()
    model.check = lambda *inputs: None  # type: ignore[method-assign]  # it reads ids, which have no values
    tokens = part_segments(config) * config.model.segment_length
    parts = config.task.segments * config.model.segment_length / tokens
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    # The positions' number is given: a mask's would depend on its values.
    where: Any = torch.zeros(scored, dtype=torch.int64), torch.zeros(scored, dtype=torch.int64)
    state: MemoryState | None = None
    output: ModelOutput | None = None
    try:
        with Allocations() as allocations:
            weights = allocations.of(model.parameters())
            allocations.hold(model.buffers())
            for _ in range(2 if parts * training.gradient_accumulation_steps > 1 else 1):
                if parts <= 1:  # what follows is another batch
                    output, state = None, state if config.task.name == "text" else None
                output = model(ids, memory_state=state)
                state = output.memory_state.detach()
                kept = allocations.of(tensor_list(state))
                total = output.logits.new_zeros(())
                if output.router_losses:
                    total = torch.stack(list(output.router_losses.values())).sum()
                if scored:
                    total = total + scored_cross_entropy(output.logits, ids, where)
                    output.logits[where].argmax(-1)
                (total * 1.0).backward()
            gradients = allocations.of(p.grad for p in model.parameters())
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"memory.kinds = {list(config.memory.kinds)}: one of them branches on the values of tensors "
            f"({error}), and fake tensors have none; its memory can only be measured in a run, such as one "
            "of few layers"
        ) from error
    gathered = allocations.resized - weights
    found = allocations.peak(
        {"weights": weights, "gradients": gradients, "gathered": gathered, "state": kept}
    )
    found["activations"] = found.pop("rest")
    trained = [p for p in model.parameters() if p.requires_grad]
    largest = max(local_bytes([p]) // p.element_size() for p in trained)
    return found, 2 * local_bytes(trained), 16 * largest


def part_segments(config: Config) -> int:
    """Segments of a row that pass between two backward passes."""
    return min(config.training.horizon or config.task.segments, config.task.segments)


def scored_positions(config: Config, data_ranks: int) -> int:
    """The most positions with a loss that a part of one rank's rows has; all, in a text."""
    length = part_segments(config) * config.model.segment_length
    rows = config.training.batch_size // data_ranks
    if config.task.name == "text":
        return rows * length
    scored = make_task(config.task, config.model.segment_length).batch(config.training.batch_size, 0).scored
    return max(int(part.sum()) for part in scored[:rows].split(length, 1))


def tensor_list(state: MemoryState) -> list[Tensor]:
    return [found for _, found in state.named_tensors()]


def count_by_group(model: MemoryTransformer) -> dict[str, int]:
    """Numbers of parameters: of embedding and output layer, of memories, and of blocks without them."""
    counts = dict.fromkeys(("embedding and output", "memories", "blocks"), 0)
    for name, p in model.named_parameters():
        inside = ".memories." in name or ".fusion." in name
        group = "memories" if inside else "blocks" if name.startswith("blocks.") else "embedding and output"
        counts[group] += p.numel()
    return counts


def largest_share(config: Config) -> float:
    """The share of all parameters that a rank has by tensor and pipeline parallelism, at the largest stage.

    Raises ConfigError for what these cannot divide.
    """
    parallel = config.parallel
    size, count = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    with torch.device("meta"):
        model = MemoryTransformer(config)
    if size > 1:
        tensor.check(model, parallel, size)
    columns = (*tensor.INTO, "attention.o_proj", *(f"mlp.{name}" for name in (*tensor.MLP, "down_proj")))
    split = tuple(f"{name}.weight" for name in columns)
    places = layers_of(
        config.model.num_layers, count * (2 if parallel.pipeline_schedule == "interleaved" else 1)
    )
    if count > 1:
        pipeline.check(model, places)
    process_of = {layer: i % count for i, layers in enumerate(places) for layer in layers}
    totals = [0.0] * count
    for name, p in model.named_parameters():
        mine = p.numel() / (size if name.endswith(split) and ".memories." not in name else 1)
        if name.startswith("head.") and parallel.loss_parallel:
            mine /= size
        layer = name.split(".")[1]
        last = process_of[config.model.num_layers - 1]
        owner = process_of[int(layer)] if layer.isdigit() else 0 if name.startswith("embedding") else last
        totals[owner] += mine
    return max(totals) / sum(p.numel() for p in model.parameters())


def advice(plan: Plan, config: Config) -> str:
    """What makes the largest kind smaller."""
    if plan.largest != "activations":
        return REMEDIES[plan.largest]
    found = []
    if not config.training.gradient_checkpointing:
        found.append("training.gradient_checkpointing=true")
    if config.parallel.mixed_precision == "none":
        found.append("parallel.mixed_precision=bf16")
    if plan.rows > 1:
        found.append("fewer rows a rank (training.batch_size, training.gradient_accumulation_steps)")
    if part_segments(config) > 1:
        found.append("training.horizon=1")
    return ", ".join([*found, "a smaller model.segment_length"])


def to_table(plan: Plan, config: Config) -> str:
    """The plan as Markdown, for people."""
    most = "" if plan.measured else " (at most: measured without tensor and pipeline parallelism)"
    shown = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer state",
        "gathered": "parameters gathered from other ranks, and their messages",
        "state": "memory state",
        "activations": f"activations, buffers and temporaries{most}",
    }
    at_update = sum(plan.update.values()) > sum(plan.held.values())
    rows = [[name, f"{plan.held[kind] / GIB:.2f}"] for kind, name in shown.items()]
    rows.append(["**sum, forward and backward**", f"**{sum(plan.held.values()) / GIB:.2f}**"])
    rows.append(["sum, optimizer's update", f"{sum(plan.update.values()) / GIB:.2f}"])
    groups = ", ".join(f"{name} {format_params(count)}" for name, count in plan.parameters.items())
    return "\n".join(
        [
            f"{format_params(sum(plan.parameters.values()))} parameters: {groups}",
            f"{plan.ranks} ranks, {plan.rows} rows each, {plan.tokens} tokens of a row per backward pass",
            "",
            markdown(["GiB per rank", "at the peak"], rows),
            "",
            f"fits in {plan.limit / GIB:g} GiB: {'yes' if plan.fits else 'no'}; the largest part"
            f"{', at the update,' if at_update else ''} is {plan.largest}; to make it smaller: "
            f"{advice(plan, config)}",
            "not counted: fragmentation of CUDA's allocator, CUDA context, NCCL, operators' workspaces",
        ]
    )
