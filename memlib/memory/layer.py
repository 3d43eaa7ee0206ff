"""The memories of one layer: opened, read, mixed and written together.

A block, an adapter's branch and a pipeline stage each hold a `LayerMemories`; nobody else uses a memory's
parameters.

Axes: b batch, n tokens of a call, p tokens already in the open segment, d hidden, h heads, k head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from memlib.memory.base import AttentionHeads, Memory, State
from memlib.nn.hook_point import HookPoint


class LayerInput(NamedTuple):
    """What a layer's memories need of the stream.

    states: one for each memory, as the previous segment left them; hidden: [b p d], the open segment's
    tokens that were read before; mask, ids: [b p+n], the open segment with the new tokens. Where the new
    tokens complete the segment, latest holds the states to write to (layers before this one may have
    written them) and has_tokens: [b] the rows with a real token, None for all; else latest is None.
    """

    states: Sequence[State]
    hidden: Tensor
    mask: Tensor
    ids: Tensor
    latest: Sequence[State] | None = None
    has_tokens: Tensor | None = None


class LayerMemories(nn.ModuleDict):
    """Memories by kind, in the order of their states."""

    def __init__(self, memories: Mapping[str, Memory] | None = None) -> None:
        super().__init__(memories or {})
        for kind, memory in self.items():  # recordings tell the memories of a layer apart
            for point in memory.modules():
                if isinstance(point, HookPoint):
                    point.name = f"{kind}.{point.name}"

    @property
    def memory_list(self) -> list[Memory]:
        return cast(list[Memory], list(self.values()))

    @property
    def fused(self) -> int:
        """How many are read beside the attention, the others being mixed into it."""
        return sum(not memory.in_attention for memory in self.memory_list)

    def open(self, inputs: LayerInput, dtype: torch.dtype) -> list[State]:
        """The states as the new tokens may see them, real numbers in the type the layer computes in."""
        pairs = zip(self.memory_list, inputs.states, strict=True)
        return [
            memory.with_open_segment(state.cast(dtype), inputs.hidden.to(dtype), inputs.mask)
            for memory, state in pairs
        ]

    def read(self, hidden: Tensor, states: Sequence[State], ids: Tensor) -> list[Tensor]:
        """What each memory beside the attention gives each token; hidden: [b n d] -> one [b n d] each."""
        return [
            memory.read(hidden, state, **({"ids": ids} if memory.uses_ids else {}))
            for memory, state in zip(self.memory_list, states, strict=True)
            if not memory.in_attention
        ]

    def mix(self, heads: AttentionHeads, states: Sequence[State]) -> Tensor:
        """The heads' attention with the share of each memory inside it, one after another: [b h n k]."""
        for memory, state in zip(self.memory_list, states, strict=True):
            if memory.in_attention:
                heads = replace(heads, attended=memory.mix(heads, state).to(heads.attended.dtype))
        return heads.attended

    def losses(self, hidden: Tensor, inputs: LayerInput) -> list[dict[str, Tensor]]:
        """What each memory adds to the loss for a complete segment; hidden: [b p+n d]."""
        pairs = zip(self.memory_list, inputs.states, strict=True)
        return [memory.losses(hidden, state.cast(hidden.dtype), inputs.mask) for memory, state in pairs]

    def write(
        self, hidden: Tensor, inputs: LayerInput, keys: Tensor | None = None, values: Tensor | None = None
    ) -> list[State]:
        """The states after a complete segment; hidden: [b p+n d], keys, values: [b h p+n k] of the layer.

        Rows without a real token keep theirs exactly.
        """
        after: list[State] = []
        for memory, state in zip(self.memory_list, inputs.latest or (), strict=True):
            more: dict[str, Tensor | None] = {"ids": inputs.ids} if memory.uses_ids else {}
            if memory.uses_heads:
                more |= {"keys": keys, "values": values}
            written = memory.write(hidden, state, inputs.mask, **more)
            after.append(written if inputs.has_tokens is None else written.where(inputs.has_tokens, state))
        return after

    @property
    def uses_heads(self) -> bool:
        return any(memory.uses_heads for memory in self.memory_list)

    @property
    def uses_logsumexp(self) -> bool:
        return any(memory.in_attention and memory.uses_logsumexp for memory in self.memory_list)

    def close(self) -> None:
        """Shut out those inside the attention; the block's fusion shuts the others."""
        for memory in self.memory_list:
            if memory.in_attention:
                memory.close()
