"""Checks of what a recurrent model is called with; each error names the value, the limit and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlib.models.state import MemoryState

if TYPE_CHECKING:
    from memlib.models.protocol import RecurrentModel

IGNORED = -100  # a label that is not predicted, as in transformers


def check_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, vocab_size: int
) -> None:
    """Raise ValueError for types and shapes that do not fit, and ids and labels outside the vocabulary.

    Looks at values, hence not at those while a graph is compiled.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [batch, tokens], not empty")
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected input_ids' {tuple(input_ids.shape)}"
            )
    for name, tensor in (("input_ids", input_ids), ("labels", labels)):
        if tensor is not None and tensor.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} is {tensor.dtype}: pass whole numbers, with {name}.long()")
    if labels is not None and not torch.compiler.is_compiling():
        predicted = labels[:, 1:][labels[:, 1:] != IGNORED]
        if not predicted.numel():
            raise ValueError(
                f"labels are all {IGNORED} behind the first token: nothing is left to predict; leave them "
                "out, or label at least one token"
            )
        low, high = int(predicted.min()), int(predicted.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"labels hold {low if low < 0 else high}: labels are ids, 0 … {vocab_size - 1}, or {IGNORED} "
                "where nothing is predicted"
            )
    if not torch.compiler.is_compiling():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}: ids are 0 … {vocab_size - 1}; "
                "tokenise with the model's own vocabulary or raise model.vocab_size"
            )


def check_fresh(fresh: Tensor, shape: torch.Size, open_tokens: int, segment_length: int) -> None:
    """Raise ValueError unless `fresh` has one boolean for each row and each segment that begins in a call.

    shape: of the call's ids; open_tokens: in the segment that the call completes first, 0 if none is open.
    """
    rows, tokens = shape
    to_come = tokens - -open_tokens % segment_length
    segments = max(0, -(-to_come // segment_length))
    if fresh.dtype != torch.bool or fresh.shape != (rows, segments):
        inside = (
            f", after {open_tokens} tokens of a segment that an earlier call began," if open_tokens else ""
        )
        raise ValueError(
            f"fresh is {fresh.dtype} of shape {list(fresh.shape)}: {tokens} tokens{inside} begin {segments} "
            f"segments of {segment_length}; pass booleans [{rows}, {segments}], true where a document begins"
        )


def check_state(model: RecurrentModel, state: object, rows: int, wide: torch.dtype) -> None:
    """Raise ValueError unless a state is one of this model's, for that many rows.

    wide: the type in which the memories keep real numbers; the window's are those of a new window.
    """
    if not isinstance(state, MemoryState):
        raise ValueError(f"memory_state is a {type(state).__name__}: expected a MemoryState or None")
    window, fresh = state.window, model.init_window(1)
    if len(window.keys) != len(fresh.keys) or len(window.hidden) != len(fresh.hidden):
        raise ValueError(
            f"memory_state is of a model with {len(window.keys)} layers, {len(window.hidden)} of them "
            f"with memory; this one has {len(fresh.keys)} and {len(fresh.hidden)}: start from None"
        )
    if window.mask.shape[0] != rows:
        raise ValueError(
            f"memory_state holds {window.mask.shape[0]} streams, input_ids "
            f"{rows}: pick rows with memory_state.rows(index) or start from None"
        )
    if window.length >= model.segment_length:
        raise ValueError(
            f"memory_state.window.mask has shape {list(window.mask.shape)}: a segment of this model has "
            f"{model.segment_length} tokens, at most {model.segment_length - 1} of them open; the state is "
            "of a model with longer segments, start from None"
        )
    fresh.layout.check(window, "memory_state.window")
    for name, tokens, expected in window.token_counts():
        if tokens != expected:
            raise ValueError(
                f"memory_state.window.{name} has {tokens} tokens, the window's mask {expected}: the state "
                "is damaged, start from None"
            )
    model.stack.check(state.memories, "memory_state.memories")
    types = {f"window.{name}": tensor.dtype for name, tensor in fresh.named_tensors()}
    for name, tensor in state.named_tensors():
        if tensor.shape[0] != rows:
            raise ValueError(
                f"memory_state.{name} has shape {list(tensor.shape)}: the state's other tensors have "
                f"{rows} rows"
            )
        expected_type = types.get(name, wide)
        if tensor.is_floating_point() and tensor.dtype != expected_type:
            raise ValueError(
                f"memory_state.{name} is {tensor.dtype}: this model keeps its state in {expected_type}; "
                f"use memory_state.cast({expected_type})"
            )
