"""What an adapter remembers between two calls: as a value, and beside the keys and values of `generate`.

Axes: b batch, h key-value heads of the base, t tokens that the base has in its cache, p tokens in the open
segment, k head width, w width of the memory branches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memlib.memory.state import axes
from memlib.models.state import MemoryState, Window


@dataclass(frozen=True)
class AdapterWindow(Window):
    """keys, values: of each layer of the base [b h t k], in the base's type; seen: [b t], false for padding.
    hidden: of each memory layer [b p w]; mask, ids: [b p], of the open segment.

    In the mode `full` t counts all tokens of the stream, else those of the open segment. A layer with a
    sliding window of s tokens keeps the newest s - 1.
    """

    seen: Tensor = axes("batch token")

    def token_counts(self) -> Iterator[tuple[str, int, int]]:
        seen = self.seen.shape[1]
        for name, tokens, length in super().token_counts():
            kind = name.partition(".")[0]
            if kind in ("keys", "values"):  # a sliding window keeps fewer: `MemoryCache.check_window`
                yield name, tokens, min(tokens, seen)
            else:
                yield name, tokens, seen if kind == "seen" else length

    def without_cache(self) -> AdapterWindow:
        """The same open segment for a base that starts anew: it has seen nothing."""
        keys, values = (tuple(one[:, :, :0] for one in many) for many in (self.keys, self.values))
        return replace(self, keys=keys, values=values, seen=self.seen[:, :0])


class MemoryCache(DynamicCache):
    """The base's keys and values, and the memories' state beside them, for transformers' `generate`.

    state: of the rows, without keys and values; None until the first forward pass, because beam search
    repeats the rows of a prompt after it has made the cache.
    """

    def __init__(self, config: Any, state: MemoryState | None = None) -> None:
        super().__init__(config=config)
        self.state: MemoryState | None = None
        if state is not None:
            window = cast(AdapterWindow, state.window)
            for layer, (keys, values) in enumerate(zip(window.keys, window.values, strict=True)):
                if keys.shape[2]:
                    self.update(keys, values, layer)
                kept: Any = self.layers[layer]
                if kept.is_sliding:  # it counts what it no longer keeps
                    kept.cumulative_length = window.seen.shape[1]
            self.state = replace(state, window=replace(window, keys=(), values=()))

    def check_window(self, window: AdapterWindow) -> None:
        """Raise ValueError unless a window has as many keys and values of each layer as this cache keeps."""
        layers: Any = self.layers
        seen = window.seen.shape[1]
        for i, layer in enumerate(layers):
            expected = min(seen, layer.sliding_window - 1) if layer.is_sliding else seen
            for name, tensor in (("keys", window.keys[i]), ("values", window.values[i])):
                if tensor.shape[2] != expected:
                    raise ValueError(
                        f"memory_state.window.{name}.{i} has {tensor.shape[2]} tokens, expected {expected} "
                        f"after {seen} tokens: the state is damaged or of another base, start from None"
                    )

    @property
    def memory_state(self) -> MemoryState:
        """All that is remembered, as a value: what `MemoryAdapter.forward` takes."""
        if self.state is None:
            raise ValueError("the cache has seen no token yet: call the adapter or generate with it first")
        layers: Any = self.layers
        keys, values = tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
        return replace(self.state, window=replace(self.state.window, keys=keys, values=values))

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.state is not None:
            rows = torch.arange(self.state.window.mask.shape[0], device=self.state.window.mask.device)
            self.pick(rows.repeat_interleave(repeats))

    def pick(self, rows: Tensor) -> None:
        """Keep these rows of the memories' state, in this order."""
        if self.state is not None:
            self.state = self.state.rows(rows.to(self.state.window.mask.device))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            f"crop({tokens_to_remove}): a memory that was written cannot be taken back, so assisted and "
            "speculative decoding do not work with memories; generate without an assistant model"
        )
