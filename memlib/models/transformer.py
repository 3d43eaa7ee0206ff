"""The one model: a transformer that reads a stream segment by segment and carries memory between them.

Axes: b batch (independent streams), t tokens of a call, n tokens of a segment, p tokens already in the
open segment, d hidden, h heads, k head width, v vocabulary.

The stream is cut into segments of `segment_length` tokens, the attention window. In a segment every
layer attends inside the window and reads its memories as earlier segments left them; when the segment
is complete, every memory layer writes it, in layer order. A call may end inside a segment: the open
window then travels in the memory state, so that a stream can be fed whole, in pieces or token by token
with the same logits and the same state (law L4), and generation needs no other cache.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlib.config import Config, get_memory_bank_assignments, get_memory_kinds
from memlib.memory import MEMORIES
from memlib.memory.base import Memory, State
from memlib.memory.gates import Gate
from memlib.models.block import StreamBlock
from memlib.models.state import MemoryState, ModelOutput, Window
from memlib.nn.attention import window_mask
from memlib.nn.norm import RMSNorm


class MemoryTransformer(nn.Module):
    """Baseline, LM2 and every later memory architecture: configs of this one model (spec D8).

    >>> outputs = model(input_ids, memory_state=state)       # state=None starts new streams
    >>> state = outputs.memory_state                         # goes into the next call
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        model, memory = config.model, config.memory
        self.bank_of_layer = get_memory_bank_assignments(config)
        kinds_of_layer = get_memory_kinds(config)
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_dim)
        self.blocks = nn.ModuleList(
            StreamBlock(
                model.hidden_dim,
                model.num_heads,
                model.intermediate_dim,
                memories={
                    kind: MEMORIES[kind](getattr(memory, kind), model.hidden_dim)
                    for kind in kinds_of_layer.get(layer, ())
                },
                fusion=memory.fusion,
                memory_block_variant=memory.memory_block_variant,
                wo_init_zero=memory.wo_init_zero,
                use_rope=model.use_rope,
                dropout=model.dropout,
            )
            for layer in range(model.num_layers)
        )
        self.places = state_places(kinds_of_layer, self.bank_of_layer)
        self.share_banks(kinds_of_layer)
        self.norm = RMSNorm(model.hidden_dim)
        self.head = nn.Linear(model.hidden_dim, model.vocab_size, bias=False)
        self.init_weights()
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def share_banks(self, kinds: dict[int, list[str]]) -> None:
        """Layers of one bank share what their memories learn together (`Memory.share`)."""
        first: dict[tuple[int, str], Memory] = {}
        for layer, here in kinds.items():
            for kind, memory in zip(here, self.block(layer).kinds(), strict=True):
                memory.share(first.setdefault((self.bank_of_layer[layer], kind), memory))

    @torch.no_grad()
    def init_weights(self) -> None:
        """All random starts in one place.

        | what                             | start                                     |
        | linear maps                      | normal, std = in_features^-0.5            |
        | maps into the residual stream    | the same / sqrt(2 layers)                 |
        | embedding and output layer       | normal, std = hidden_dim^-0.5             |
        | gates                            | zero weight, their configured bias        |
        | residual fusion's W_o and B's MLP | zero where wo_init_zero                  |
        | slots, addresses, convolutions   | as their modules say                      |
        """
        depth = (2 * self.config.model.num_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not isinstance(module, Gate) and "fusion" not in name:
                std = module.in_features**-0.5
                into_stream = name.endswith(("attention.o_proj", "mlp.down_proj"))
                module.weight.normal_(0.0, std * depth if into_stream else std)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, module.embedding_dim**-0.5)
        for layer in range(self.config.model.num_layers):
            extra = self.block(layer).extra_mlp
            if extra is not None and self.config.memory.wo_init_zero:
                extra.down_proj.weight.zero_()

    def block(self, layer: int) -> StreamBlock:
        """The block of a layer."""
        return cast(StreamBlock, self.blocks[layer])

    # -------------------------------------------------------------------------------------- the state

    def init_state(self, batch_size: int) -> MemoryState:
        """The state of streams that have seen nothing."""
        model = self.config.model
        weight = self.embedding.weight
        shape = (batch_size, model.num_heads, 0, model.hidden_dim // model.num_heads)
        banks: dict[int, State] = {}
        for layer, places in self.places.items():
            for place, memory in zip(places, self.block(layer).kinds(), strict=True):
                if place not in banks:
                    banks[place] = memory.init_state(batch_size)
        return MemoryState(
            banks=tuple(banks[place] for place in sorted(banks)),
            window=Window(
                keys=tuple(weight.new_zeros(shape) for _ in self.blocks),
                values=tuple(weight.new_zeros(shape) for _ in self.blocks),
                hidden=tuple(weight.new_zeros(batch_size, 0, model.hidden_dim) for _ in self.bank_of_layer),
                mask=torch.zeros(batch_size, 0, dtype=torch.bool, device=weight.device),
            ),
        )

    def reset(self, state: MemoryState, rows: Tensor) -> MemoryState:
        """Forget everything of some rows (a new document, a new user); rows: [b] true = forget."""
        fresh = self.init_state(state.window.mask.shape[0])
        window = state.window
        return MemoryState(
            banks=tuple(old.where(~rows, new) for old, new in zip(state.banks, fresh.banks, strict=True)),
            window=window.where(~rows, window.map(torch.zeros_like)),
        )

    # ------------------------------------------------------------------------------------ the forward

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory_state: MemoryState | None = None,
    ) -> ModelOutput:
        """input_ids: [b t] of any length; attention_mask: [b t], 0 for padding, left or right;
        labels: [b t] as in transformers (the same ids, shifted here, -100 ignored).

        Raises ValueError where shapes, ids or the state do not fit.
        """
        self.check(input_ids, attention_mask, labels, memory_state)
        state = memory_state or self.init_state(input_ids.shape[0])
        mask = None if attention_mask is None else attention_mask.bool()
        logits, start = [], 0
        auxiliary: list[dict[str, Tensor]] = []
        while start < input_ids.shape[1]:
            stop = start + self.config.model.segment_length - state.window.length
            piece = slice(start, min(stop, input_ids.shape[1]))
            stream, state, losses = self.advance(
                input_ids[:, piece], None if mask is None else mask[:, piece], state
            )
            auxiliary += losses
            logits.append(self.head(self.norm(stream)))
            start = piece.stop
        joined = torch.cat(logits, 1)
        loss = None
        if labels is not None:
            predicted = rearrange(joined[:, :-1], "b t v -> (b t) v")
            loss = F.cross_entropy(predicted, rearrange(labels[:, 1:], "b t -> (b t)"))
        return ModelOutput(joined, state, loss, mean_by_name(auxiliary))

    def advance(
        self, ids: Tensor, mask: Tensor | None, state: MemoryState
    ) -> tuple[Tensor, MemoryState, list[dict[str, Tensor]]]:
        """Read up to the end of the open segment, and write it if that completes it.

        ids: [b m] -> the residual stream [b m d], the state after it, and its memories' losses if complete.
        """
        past, whole = state.window, mask is None and not state.window.length
        new = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        valid = torch.cat((past.mask, new), 1)
        allowed = window_mask(ids.shape[1], None if whole else valid, past.length, ids.device)
        stream = self.embedding(ids)
        again = self.training and self.config.training.gradient_checkpointing
        keys: list[Tensor] = []
        values: list[Tensor] = []
        hidden: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            states = self.opened(layer, state.banks, past.hidden[len(hidden) :], valid)
            read = partial(checkpoint, block, use_reentrant=False) if again else block
            output = read(stream, past.keys[layer], past.values[layer], allowed, states)
            stream = output.stream
            keys.append(output.keys)
            values.append(output.values)
            if layer in self.bank_of_layer:
                hidden.append(torch.cat((past.hidden[len(hidden)], output.hidden), 1))
        window = Window(tuple(keys), tuple(values), tuple(hidden), valid)
        if window.length < self.config.model.segment_length:
            return stream, MemoryState(state.banks, window), []
        losses = self.losses(window.hidden, state.banks, valid)
        banks = self.write(window.hidden, state.banks, valid)
        return stream, MemoryState(banks, window.emptied()), losses

    def opened(
        self, layer: int, banks: tuple[State, ...], past: tuple[Tensor, ...], mask: Tensor
    ) -> list[State]:
        """The states a layer reads, none without memory; past: the open segment's hidden [b p d] of this
        memory layer and those after it; mask: [b p+n]."""
        pairs = zip(self.places.get(layer, ()), self.block(layer).kinds(), strict=True)
        return [memory.opened(banks[place], past[0], mask) for place, memory in pairs]

    def losses(
        self, hidden: tuple[Tensor, ...], banks: tuple[State, ...], mask: Tensor
    ) -> list[dict[str, Tensor]]:
        """What each memory adds to the loss for a finished segment; hidden: per memory layer [b n d]."""
        return [
            memory.losses(segment, banks[place], mask)
            for segment, layer in zip(hidden, self.bank_of_layer, strict=True)
            for place, memory in zip(self.places[layer], self.block(layer).kinds(), strict=True)
        ]

    def write(self, hidden: tuple[Tensor, ...], banks: tuple[State, ...], mask: Tensor) -> tuple[State, ...]:
        """Every memory layer writes the finished segment, in layer order; hidden: per layer [b n d].

        Rows whose segment was all padding keep their state as it was.
        """
        states, awake = list(banks), mask.any(1)
        all_awake = bool(awake.all())  # the usual case: spares a copy of every state
        for segment, layer in zip(hidden, self.bank_of_layer, strict=True):
            for i, memory in zip(self.places[layer], self.block(layer).kinds(), strict=True):
                written = memory.write(segment, states[i], mask)
                states[i] = written if all_awake else written.where(awake, states[i])
        return tuple(states)

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
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}: expected [batch, tokens], not empty"
            )
        for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: expected input_ids' {tuple(input_ids.shape)}"
                )
        vocab, low, high = self.config.model.vocab_size, int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}: ids are 0 … {vocab - 1}; "
                "tokenise with the model's own vocabulary or raise model.vocab_size"
            )
        if memory_state is None:
            return
        layers, window = len(self.bank_of_layer), memory_state.window
        if len(window.keys) != len(self.blocks) or len(window.hidden) != layers:
            raise ValueError(
                f"memory_state is of a model with {len(window.keys)} layers, {len(window.hidden)} of them "
                f"with memory; this one has {len(self.blocks)} and {layers}: start from None"
            )
        if window.mask.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"memory_state holds {window.mask.shape[0]} streams, input_ids "
                f"{input_ids.shape[0]}: pick rows with memory_state.rows(index) or start from None"
            )


def state_places(kinds: dict[int, list[str]], banks: dict[int, int]) -> dict[int, list[int]]:
    """Memory layer -> where in `MemoryState.banks` each of its memories has its state.

    Memories of one kind in layers of one bank share a state, if their kind shares states.
    """
    numbers: dict[tuple[int, str], int] = {}

    def place(layer: int, kind: str) -> int:
        # A layer that keeps its state to itself counts as a bank of its own, below zero.
        owner = banks[layer] if MEMORIES[kind].shares_state else -1 - layer
        return numbers.setdefault((owner, kind), len(numbers))

    return {layer: [place(layer, kind) for kind in here] for layer, here in kinds.items()}


def mean_by_name(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each name's values over all that have it."""
    names = dict.fromkeys(name for some in losses for name in some)
    return {name: torch.stack([some[name] for some in losses if name in some]).mean() for name in names}
