"""Pipeline parallelism: processes that hold consecutive layers pass the rows' microbatches on to each other.

Only the residual stream travels between stages. What a layer remembers stays with it: a stage reads whole
pieces of a stream segment by segment, layer by layer, and keeps its own layers' states for all rows. So
gradients flow through the memory inside a piece, as on one process.

Where a memory's state passes through layers of two stages, the second would wait for the first at every
segment: that is refused. So are losses of memories (they need the whole batch, a stage sees microbatches),
stores (a cursor names a file of one process) and tied embeddings.

Source: GPipe, Huang et al. 2019, arXiv 1811.06965; 1F1B and interleaved stages, Narayanan et al. 2021,
arXiv 2104.04473. The order of passes is torch.distributed.pipelining's.

Axes: b rows of this process's share of the batch, t tokens of a piece, d features.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.nn import functional as F

from memlib.config import ConfigError, get_memory_bank_assignments
from memlib.models import MemoryState, MemoryTransformer, ModelOutput
from memlib.models.block import TransformerBlock
from memlib.models.stack import MemoryStack, States
from memlib.models.state import Window
from memlib.models.transformer import read_blocks
from memlib.nn.noise import Noise
from memlib.tasks.scoring import correct
from memlib.training.parallel.ranks import Ranks

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}


def check(model: MemoryTransformer, stages: list[range]) -> None:
    """Raise ConfigError, with the reason, for a model that cannot be cut into these stages."""
    owners: dict[int, int] = {}
    for layer, slot, memory in model.stack:
        stage = next(i for i, layers in enumerate(stages) if layer in layers)
        if owners.setdefault(slot, stage) != stage:
            raise ConfigError(
                f"parallel.pipeline_parallel_size: layers of stages {owners[slot]} and {stage} share a "
                f"{type(memory).__name__}'s state, so each segment would pass through the pipeline alone; "
                "set memory.memory_sharing: per_layer, or share among the layers of one stage only"
            )
        if memory.adds_losses:
            raise ConfigError(
                f"parallel.pipeline_parallel_size: the {type(memory).__name__} of layer {layer} adds a loss "
                "of the whole batch, and a stage sees microbatches; switch that loss off, or use "
                "parallel.distributed_strategy: fsdp"
            )


def layers_of(num_layers: int, stages: int) -> list[range]:
    """Consecutive layers of each stage; where they do not divide evenly, the first ones get one more."""
    share, more = divmod(num_layers, stages)
    starts = [stage * share + min(stage, more) for stage in range(stages + 1)]
    return [range(*pair) for pair in pairwise(starts)]


class Stage(nn.Module):
    """Some layers of a model, under the names that they have there."""

    def __init__(self, model: MemoryTransformer, layers: range, stack: MemoryStack) -> None:
        super().__init__()
        self.config, self.stack = model.config, stack
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in layers})
        self.embedding = model.embedding if 0 in layers else None
        last = model.config.model.num_layers - 1 in layers
        self.norm = model.norm if last else None
        self.head = model.head if last else None
        self.before: States = ()
        self.after: dict[int, States] = {}  # by the first row of each microbatch

    def forward(self, stream: Tensor, rows: Tensor, ids: Tensor, keys: Tensor | None = None) -> Tensor:
        """stream: ids [b t] in the first stage, else the residual stream [b t d]; rows: [b], which rows of
        the states these are; keys: [b], of their `Noise`. Returns the stream after these layers, or
        logits in the last stage."""
        state = MemoryState(tuple(state.rows(rows) for state in self.before), self.empty_window(rows))
        length, read = self.config.model.segment_length, list[Tensor]()
        blocks = {int(layer): block for layer, block in self.blocks.items()}
        segments = ids.split(length, 1)
        for piece, tokens in zip(stream.chunk(len(segments), 1), segments, strict=True):
            residual = piece if self.embedding is None else self.embedding(piece)
            noise = None if keys is None else Noise(keys, segment=len(read))
            residual, state, _ = read_blocks(
                blocks, self.stack, residual, tokens, None, state, length, self.config.training, noise
            )
            if self.norm is not None and self.head is not None:
                residual = self.head(self.norm(residual))
            read.append(residual)
        self.after[int(rows[0])] = state.detach().memories
        return torch.cat(read, 1)

    def empty_window(self, rows: Tensor) -> Window:
        """The window at a segment's border; rows: [b]."""
        model = self.config.model
        none = partial(torch.zeros, len(rows), device=rows.device)
        heads, width = (
            none(model.num_heads, 0, model.hidden_dim // model.num_heads),
            none(0, model.hidden_dim),
        )
        count, memories = len(self.blocks), sum(int(layer) in self.stack.layers for layer in self.blocks)
        return Window((heads,) * count, (heads,) * count, (width,) * memories, none(0).bool(), none(0).long())

    @property
    def slots(self) -> list[int]:
        """The places of its layers' states."""
        return [slot for layer in self.blocks for slot in self.stack.slots.get(int(layer), ())]


class Pipeline(nn.Module):
    """This process's stages of a model, and the schedule that connects them to the others.

    Called like the model it returns logits on every process, for evaluation; `learn` is a training step's
    forward and backward pass. A state holds the memories of this process's layers.
    """

    def __init__(self, model: MemoryTransformer, ranks: Ranks) -> None:
        super().__init__()
        self.config, self.ranks = model.config, ranks
        parallel, size = model.config.parallel, ranks.size("stage")
        count = size * (2 if parallel.pipeline_schedule == "interleaved" else 1)
        self.places = layers_of(model.config.model.num_layers, count)
        check(model, self.places)
        self.mine = range(ranks.place("stage"), count, size)
        layers = {layer: model.block(layer).memories for stage in self.mine for layer in self.places[stage]}
        self.stack = MemoryStack(layers, get_memory_bank_assignments(model.config))
        self.parts = nn.ModuleList(Stage(model, self.places[stage], self.stack) for stage in self.mine)
        self.connected: dict[torch.Size, Any] = {}
        self.scale = 1.0

    @property
    def stages(self) -> list[Stage]:
        """The stages of this process."""
        return cast(list[Stage], list(self.parts))

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The layers of this process."""
        return [cast(TransformerBlock, block) for stage in self.stages for block in stage.blocks.values()]

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def segment_length(self) -> int:
        """Tokens of a segment."""
        return self.config.model.segment_length

    def init_state(self, batch_size: int) -> MemoryState:
        """The state of streams that have seen nothing."""
        tokens = torch.zeros(batch_size, 0, device=self.device)
        return MemoryState(
            self.stack.init_state(batch_size), Window((), (), (), tokens.bool(), tokens.long())
        )

    def reset(self, state: MemoryState, rows: Tensor) -> MemoryState:
        """Forget everything of some rows; rows: [b] true = forget."""
        return state.reset(rows, self.stack.init_state(len(rows)))

    # ----------------------------------------------------------------------------------------- training

    def learn(
        self,
        ids: Tensor,
        targets: Tensor,
        scored: Tensor,
        state: MemoryState | None,
        scale: float,
        noise: Noise | None = None,
    ) -> tuple[MemoryState, float, int]:
        """Add the gradients of scale x the sum of the losses at the scored positions.

        ids, targets, scored: [b t], whole segments. Returns the state after them and, from the process with
        the last stage, that sum of losses and the number of correct predictions; elsewhere zeros.
        """
        state = state or self.init_state(len(ids))
        self.begin(state)
        wanted = torch.where(scored, targets, -100)
        rows = torch.arange(len(ids), device=ids.device)
        losses: list[Tensor] = []
        schedule = self.connect(ids.shape, scale)
        first, last = 0 in self.mine, len(self.places) - 1 in self.mine
        given = (ids,) if first else ()
        asked = {"target": wanted, "losses": losses} if last else {}
        # A schedule's first step throws away the gradients of sharded stages (torch 2.13): keep the earlier.
        earlier = [p.grad for p in self.parameters()]
        self.zero_grad()
        keys = {} if noise is None else {"keys": noise.keys}
        output = schedule.step(*given, rows=rows, ids=ids, **keys, **asked)
        for p, gradient in zip(self.parameters(), earlier, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
        after = self.end(state)
        if not last:
            return after, 0.0, 0
        loss = float(torch.stack([loss.detach() for loss in losses]).sum()) / scale
        return after, loss, correct(output.detach(), targets, scored)

    def connect(self, shape: torch.Size, scale: float) -> Any:
        """The schedule for pieces of a shape; each process of a pipeline asks for the same."""
        parallel = self.config.parallel
        rows, length = shape[0] // parallel.pipeline_microbatches, shape[1]
        if shape not in self.connected:
            model = self.config.model
            ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
            between, logits = (
                torch.empty(rows, *sizes, dtype=self.dtype, device="meta", requires_grad=True)
                for sizes in ((self.tokens_between(length), model.hidden_dim), (length, model.vocab_size))
            )
            assert self.ranks.mesh is not None
            found = [
                PipelineStage(
                    stage,
                    number,
                    len(self.places),
                    self.device,
                    input_args=(ids if number == 0 else between,),
                    output_args=(logits if number == len(self.places) - 1 else between,),
                    group=self.ranks.mesh.get_group("stage"),
                )
                for stage, number in zip(self.stages, self.mine, strict=True)
            ]
            self.connected[shape] = SCHEDULES[parallel.pipeline_schedule](
                found if parallel.pipeline_schedule == "interleaved" else found[0],
                n_microbatches=parallel.pipeline_microbatches,
                loss_fn=lambda output, target: self.scale * summed(output, target),
                scale_grads=False,
            )
        self.scale = scale
        return self.connected[shape]

    def tokens_between(self, tokens: int) -> int:
        """Tokens of the residual stream that one process has, with sequence parallelism a part of them."""
        parallel = self.config.parallel
        return tokens // (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return wanted.get(self.config.parallel.mixed_precision, next(self.parameters()).dtype)

    def begin(self, state: MemoryState) -> None:
        """Give every stage its states."""
        for stage in self.stages:
            stage.before, stage.after = state.memories, {}

    def end(self, state: MemoryState) -> MemoryState:
        """The states of all rows after a piece, from those before it."""
        memories = list(state.memories)
        for stage in self.stages:
            parts = [states for _, states in sorted(stage.after.items())]
            for slot in stage.slots:  # a stage has changed those of its own layers
                memories[slot] = parts[0][slot].join(*(part[slot] for part in parts[1:]))
        return replace(state, memories=tuple(memories))

    # --------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def forward(self, ids: Tensor, memory_state: MemoryState | None = None) -> ModelOutput:
        """Logits of whole segments on every process, one stage after another."""
        assert self.ranks.mesh is not None
        state = memory_state or self.init_state(len(ids))
        self.begin(state)
        group, size = self.ranks.mesh.get_group("stage"), self.ranks.size("stage")
        rows, stages = torch.arange(len(ids), device=ids.device), iter(self.stages)
        model, stream, (b, t) = self.config.model, ids, ids.shape
        for number in range(len(self.places)):
            last = number == len(self.places) - 1
            sizes = (t, model.vocab_size) if last else (self.tokens_between(t), model.hidden_dim)
            if number in self.mine:
                stream = next(stages)(stream, rows, ids)
            else:
                stream = torch.empty(b, *sizes, dtype=self.dtype, device=self.device)
            dist.broadcast(stream, group=group, group_src=number % size)
        return ModelOutput(stream, self.end(state), None, {})


def summed(output: Tensor, target: Tensor) -> Tensor:
    """The sum of the losses at the scored positions of a microbatch; a target of -100 is not scored."""
    wide = torch.promote_types(output.dtype, torch.float32)
    return F.cross_entropy(
        output.to(wide).flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum"
    )
