"""The one model: a transformer that reads a stream segment by segment and carries memory between them.

Axes: b batch (independent streams), t tokens of a call, n tokens of a step, p tokens already in the open
segment, d hidden, h heads, k head width, v vocabulary.

The stream is cut into segments of `segment_length` tokens, the attention window. In a segment every
layer attends inside the window and reads its memories as earlier segments left them; when the segment
is complete, every memory layer writes it, in layer order. A call may end inside a segment: the open
window then travels in the memory state, so that a stream can be fed whole, in pieces or token by token
with the same logits and the same state (law L4), and generation needs no other cache.

`forward` checks what it is given and walks the segments; `step` reads at most up to the end of one and is
the graph that can be compiled or exported. The layers' bookkeeping is `memlib.models.stack`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import Config, TrainingConfig, get_memory_bank_assignments, get_memory_kinds
from memlib.memory import MEMORIES
from memlib.memory.base import zeros
from memlib.memory.layer import LayerInput
from memlib.models.block import BlockOutput, TransformerBlock
from memlib.models.checks import check_fresh, check_inputs, check_state
from memlib.models.recompute import recomputed
from memlib.models.stack import MemoryStack
from memlib.models.state import MemoryState, ModelOutput, Window
from memlib.nn.attention import window_mask
from memlib.nn.linear import Embedding, Linear, initialise
from memlib.nn.noise import Noise
from memlib.nn.norm import RMSNorm

Losses = list[dict[str, Tensor]]


class MemoryTransformer(nn.Module):
    """A transformer with any registered memories; every architecture is a configuration of this one model.

    >>> outputs = model(input_ids, memory_state=state)       # state=None starts new streams
    >>> state = outputs.memory_state                         # goes into the next call

    Random starts: linear maps normal with deviation in_features^-0.5, those into the residual stream the
    same / sqrt(2 layers), embedding and output layer hidden_dim^-0.5; gates, slots and addresses as their
    modules say. Built on the meta device, a model gets them by `initialise` after `to_empty`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        model, memory = config.model, config.memory
        kinds = get_memory_kinds(config)
        self.embedding = Embedding(model.vocab_size, model.hidden_dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                model.hidden_dim,
                model.num_heads,
                model.intermediate_dim,
                memories={
                    kind: MEMORIES[kind](getattr(memory, kind), model.hidden_dim)
                    for kind in kinds.get(layer, ())
                },
                fusion=memory.fusion,
                memory_block_variant=memory.memory_block_variant,
                wo_init_zero=memory.wo_init_zero,
                use_rope=model.use_rope,
                dropout=model.dropout,
                out_scale=(2 * model.num_layers) ** -0.5,
                attention_window=model.attention_window,
            )
            for layer in range(model.num_layers)
        )
        layers = {layer: self.block(layer).memories for layer in range(model.num_layers)}
        self.stack = MemoryStack(layers, get_memory_bank_assignments(config))
        self.norm = RMSNorm(model.hidden_dim)
        self.head = Linear(model.hidden_dim, model.vocab_size)
        initialise(self)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def block(self, layer: int) -> TransformerBlock:
        """The block of a layer."""
        return cast(TransformerBlock, self.blocks[layer])

    @property
    def segment_length(self) -> int:
        """Tokens of a segment."""
        return self.config.model.segment_length

    @property
    def device(self) -> torch.device:
        """Where ids and states belong."""
        return self.embedding.weight.device

    # -------------------------------------------------------------------------------------- the state

    def init_state(self, batch_size: int) -> MemoryState:
        """The state of streams that have seen nothing."""
        return MemoryState(self.stack.init_state(batch_size), self.init_window(batch_size))

    def init_window(self, batch_size: int) -> Window:
        """A window without tokens."""
        model = self.config.model
        none = partial(zeros, self.embedding, batch_size)
        k = model.hidden_dim // model.num_heads
        heads = [self.block(layer).attention.num_heads for layer in range(model.num_layers)]
        return Window(
            keys=tuple(none(h, 0, k) for h in heads),
            values=tuple(none(h, 0, k) for h in heads),
            hidden=tuple(none(0, model.hidden_dim) for _ in self.stack.layers),
            mask=none(0, dtype=torch.bool),
            ids=none(0, dtype=torch.int64),
        )

    def reset(self, state: MemoryState, rows: Tensor) -> MemoryState:
        """Forget everything of some rows (a new document, a new user); rows: [b] true = forget."""
        return state.reset(rows, self.stack.init_state(state.window.mask.shape[0]))

    # ------------------------------------------------------------------------------------ the forward

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory_state: MemoryState | None = None,
        noise: Noise | None = None,
        fresh: Tensor | None = None,
    ) -> ModelOutput:
        """input_ids: [b t] of any length; attention_mask: [b t], 0 for padding, left or right;
        labels: [b t] as in transformers (the same ids, shifted here, -100 ignored); noise: of these rows, for
        dropout that does not depend on how a batch is divided; fresh: [b s], true where a row's document
        begins with one of the s segments that begin in this call, so that the row is `reset` before it. A
        segment left open by an earlier call does not begin in this one.

        Raises ValueError where shapes, ids or the state do not fit.
        """
        self.check(input_ids, attention_mask, labels, memory_state)
        state = memory_state or self.init_state(input_ids.shape[0])
        mask = None if attention_mask is None else attention_mask.bool()
        if fresh is not None:
            check_fresh(fresh, input_ids.shape, state.window.length, self.segment_length)
        begin = iter(() if fresh is None else fresh.unbind(1))
        logits, start = list[Tensor](), 0
        losses: Losses = []
        while start < input_ids.shape[1]:
            stop = min(start + self.segment_length - state.window.length, input_ids.shape[1])
            part = slice(start, stop)
            if fresh is not None and not state.window.length:
                state = self.reset(state, next(begin))
            new, state, more = self.step(
                input_ids[:, part],
                None if mask is None else mask[:, part],
                state,
                None if noise is None else noise.at(segment=len(logits)),
            )
            losses += more
            logits.append(new)
            start = stop
        joined = torch.cat(logits, 1)
        loss = None
        if labels is not None:
            predicted = rearrange(joined[:, :-1], "b t v -> (b t) v")
            loss = F.cross_entropy(predicted, rearrange(labels[:, 1:], "b t -> (b t)"))
        return ModelOutput(joined, state, loss, mean_by_name(losses))

    def step(
        self, ids: Tensor, mask: Tensor | None, state: MemoryState, noise: Noise | None = None
    ) -> tuple[Tensor, MemoryState, Losses]:
        """Read tokens up to the end of the open segment, and write it if they complete it.

        ids: [b n]; mask: [b n] of booleans, None if all tokens are real -> logits [b n v], the state after
        them, and the memories' losses if complete. Nothing here depends on a tensor's values: it can be
        compiled and exported. Inputs are not checked.
        """
        residual, state, losses = read_blocks(
            dict(enumerate(self.blocks)),
            self.stack,
            self.embedding(ids),
            ids,
            mask,
            state,
            self.segment_length,
            self.config.training,
            noise,
        )
        return self.head(self.norm(residual)), state, losses

    def close_memory(self) -> None:
        """Shut every memory out (law L5): from here on exactly the plain transformer."""
        for layer in range(self.config.model.num_layers):
            self.block(layer).close_memory()

    def check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        memory_state: MemoryState | None,
    ) -> None:
        """Refuse what does not fit, with the value, the limit and the remedy."""
        check_inputs(input_ids, attention_mask, labels, self.config.model.vocab_size)
        if memory_state is not None:
            wide = torch.promote_types(self.embedding.weight.dtype, torch.float32)
            check_state(self, memory_state, input_ids.shape[0], wide)


def read_blocks(
    blocks: Mapping[int, nn.Module],
    stack: MemoryStack,
    residual: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    state: MemoryState,
    segment_length: int,
    training: TrainingConfig,
    noise: Noise | None = None,
) -> tuple[Tensor, MemoryState, Losses]:
    """Pass tokens of the open segment through some layers, and write their memories if they complete it.

    blocks: by layer, all or those of a pipeline's stage; stack: of their memories; residual: [b n d]; ids,
    mask, state: as `MemoryTransformer.step` takes them; training: says what is computed again in the backward
    pass.
    """
    past, n = state.window, ids.shape[1]
    all_real = mask is None and not past.length
    new = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    valid, window_ids = torch.cat((past.mask, new), 1), torch.cat((past.ids, ids), 1)
    allowed = window_mask(n, None if all_real else valid, past.length, ids.device)
    complete = past.length + n == segment_length
    has_tokens = None if all_real else valid.any(1)
    latest, outputs = list(state.memories), []
    hidden = dict(zip((layer for layer in blocks if layer in stack.layers), past.hidden, strict=True))
    for block, layer, keys, values in zip(blocks.values(), blocks, past.keys, past.values, strict=True):
        inputs = None
        if layer in hidden:
            inputs = LayerInput(
                states=stack.at(layer, state.memories),
                hidden=hidden[layer],
                mask=valid,
                ids=window_ids,
                latest=stack.at(layer, latest) if complete else None,
                has_tokens=has_tokens,
            )
        read = recomputed(block, layer, training)
        own = None if noise is None else noise.at(noise.segment, layer)
        output: BlockOutput = read(residual, keys, values, allowed, inputs, own)
        if inputs is not None and complete:
            stack.put(layer, latest, output.states)
        residual = output.residual
        outputs.append(output)
    window = Window(
        tuple(output.keys for output in outputs),
        tuple(output.values for output in outputs),
        tuple(output.hidden for output in outputs if output.hidden is not None),
        valid,
        window_ids,
    )
    if complete:
        window = window.emptied()
    window = window.cast(torch.promote_types(residual.dtype, torch.float32))
    losses = [loss for output in outputs for loss in output.losses]
    return residual, MemoryState(tuple(latest), window), losses


def mean_by_name(losses: Losses) -> dict[str, Tensor]:
    """The mean of each name's values over all that have it."""
    names = dict.fromkeys(name for some in losses for name in some)
    return {name: torch.stack([some[name] for some in losses if name in some]).mean() for name in names}
