"""What generation, sessions, states, recordings and training need of a model.

`MemoryTransformer` has it, and so can an adapter around a pretrained model or a stage of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memlib.models.stack import MemoryStack
from memlib.models.state import MemoryState, ModelOutput, Window


class RecurrentModel(Protocol):
    """A model of streams, read segment by segment; what it remembers is a value.

    segment_length: tokens of a segment; device: where ids and states belong; stack: its memories and the
    places of their states; blocks: one module for each layer, with the hook points inside.
    """

    training: bool
    config: Any
    stack: MemoryStack

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def segment_length(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def init_state(self, batch_size: int) -> MemoryState:
        """The state of streams that have seen nothing."""
        ...

    def init_window(self, batch_size: int) -> Window:
        """A window without tokens."""
        ...

    def reset(self, state: MemoryState, rows: Tensor) -> MemoryState:
        """Forget everything of some rows; rows: [b] true = forget."""
        ...

    def check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        memory_state: MemoryState | None,
    ) -> None:
        """Raise ValueError for what `__call__` would refuse."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory_state: MemoryState | None = None,
    ) -> ModelOutput: ...

    def register_forward_pre_hook(self, hook: Any, *, with_kwargs: bool = False) -> Any: ...

    def register_forward_hook(self, hook: Any) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
