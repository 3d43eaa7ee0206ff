"""Stores for a model's external memories: key-value pairs outside the state, on disk if wanted.

    stores = attach_stores(model, "notes")          # opened if saved there before, else new
    state = model(ids, memory_state=state).memory_state
    save_stores(stores, "notes")                    # and the state: two integers and a token for each row

Layers that share a state share a store. Stored keys are those of the weights that made them: after more
training, `stale_report` says how far today's keys have moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from memlib.config import IndexConfig
from memlib.memory.external.backends import ExternalState, StoreBackend, StoredState
from memlib.memory.external.memory import ExternalMemory, shape_for
from memlib.memory.external.stale import StaleKeys, stale_keys
from memlib.memory.external.storage import MANIFEST, open_store, save_store
from memlib.memory.external.store import Store
from memlib.models.eval_mode import eval_mode
from memlib.models.protocol import RecurrentModel
from memlib.models.state import MemoryState

Stores = dict[int, Store]


def each_external(model: RecurrentModel) -> Iterator[tuple[int, ExternalMemory]]:
    """Each external memory with its state's slot in `MemoryState.memories`; none for other models."""
    for _, slot, memory in model.stack:
        if isinstance(memory, ExternalMemory):
            yield slot, memory


def external_memories(model: RecurrentModel) -> dict[int, list[ExternalMemory]]:
    """The model's external memories by the slot of their state; ValueError where there are none."""
    found: dict[int, list[ExternalMemory]] = {}
    for slot, memory in each_external(model):
        found.setdefault(slot, []).append(memory)
    if not found:
        raise ValueError("this model has no external memory: set memory.kinds: [external]")
    return found


def attach_stores(
    model: RecurrentModel,
    folder: str | os.PathLike[str] | None = None,
    index: IndexConfig | None = None,
) -> Stores:
    """Give every external memory a store; returns the stores by the slot of their state.

    folder: where saved stores are opened. index: how they search, the configuration's if None. Raises
    ValueError for a model without external memory or stores of other sizes, StoreError for damaged files.
    """
    stores: Stores = {}
    sketches = encoder_sketches(model)
    for slot, memories in external_memories(model).items():
        path = Path(folder or "", f"bank-{slot}")
        weight, config = memories[0].v_proj.weight, memories[0].config
        if folder is not None and (path / MANIFEST).exists():
            store = open_store(path, index or config.index)
        else:
            dtype = str(weight.dtype).removeprefix("torch.")
            store = Store(shape_for(config, weight.shape[0], dtype), index or config.index)
        for memory in memories:
            memory.attach(store)
        store.note_encoder(sketches[slot])
        stores[slot] = store
    return stores


def detach_stores(model: RecurrentModel) -> None:
    """Move the memories back to keeping their pairs in their states."""
    for memories in external_memories(model).values():
        for memory in memories:
            memory.attach(None)


def save_stores(stores: Stores, folder: str | os.PathLike[str]) -> None:
    """Save each store into its own folder; a failed save leaves the previous one whole."""
    for slot, store in stores.items():
        save_store(store, Path(folder, f"bank-{slot}"))


def forget_streams(model: RecurrentModel, state: MemoryState) -> None:
    """Delete from attached stores all pairs of a state's streams; the state is then unreadable.

    So are earlier states of the same streams. A model without stores has nothing to delete.
    """
    for slot, memory in each_external(model):
        if isinstance(memory.backend, StoreBackend):
            for stream in cast(StoredState, state.memories[slot]).stream.tolist():
                memory.backend.store.forget(stream)


def attached_stores(model: RecurrentModel) -> list[Store]:
    """The stores attached to memories of the model, each once; none without."""
    backends = [memory.backend for _, memory in each_external(model)]
    stores = {id(backend.store): backend.store for backend in backends if isinstance(backend, StoreBackend)}
    return list(stores.values())


@contextmanager
def forgetting_on_failure(model: RecurrentModel) -> Iterator[None]:
    """On exception, drop the streams created in this block; no state refers to them.

    Pairs appended to older streams stay; no known cursor can see them.
    """
    begun = [(store, store.next_stream) for store in attached_stores(model)]
    try:
        yield
    except BaseException:
        for store, first in begun:
            for stream in range(first, store.next_stream):
                store.forget(stream)
        raise


@torch.no_grad()
def encoder_sketches(model: RecurrentModel) -> dict[int, Tensor]:
    """The keys that the model makes today of one fixed segment, by slot of the state: [h n k]."""
    memories = external_memories(model)
    backends = {slot: [memory.backend for memory in group] for slot, group in memories.items()}
    n, vocab = model.segment_length, model.config.model.vocab_size
    tokens = torch.arange(n, device=model.device) * max(1, vocab // n) % vocab
    detach_stores(model)
    try:
        with eval_mode(model):
            states = model(tokens[None]).memory_state.memories
        return {slot: cast(ExternalState, states[slot]).keys[0, :, :n].cpu() for slot in memories}
    finally:
        for slot, group in memories.items():
            for memory, backend in zip(group, backends[slot], strict=True):
                memory.backend = backend


def stale_report(model: RecurrentModel) -> dict[int, list[StaleKeys]]:
    """For each attached store: rows by the encoder that made their keys, and the drift of that encoder."""
    sketches = encoder_sketches(model)
    return {
        slot: stale_keys(group[0].backend.store, sketches[slot])
        for slot, group in external_memories(model).items()
        if isinstance(group[0].backend, StoreBackend)
    }
