"""A model whose external memories keep their pairs in stores, on disk if wanted.

    stores = attach_stores(model, "notes")          # opened where it was saved before, else new
    state = model(ids, memory_state=state).memory_state
    save_stores(stores, "notes")                    # and the state: two integers and a token for each row

Layers that share a state share a store. A store holds what the model's weights made of the text: after
more training, `stale_report` says how far today's keys have moved from those.
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
from memlib.memory.external import ExternalMemory, shape_for
from memlib.memory.shelves import StoredState, StoreShelf
from memlib.memory.stale import StaleKeys, stale_keys
from memlib.memory.storage import MANIFEST, open_store, save_store
from memlib.memory.store import Store
from memlib.models.evaluating import evaluating
from memlib.models.state import MemoryState
from memlib.models.transformer import MemoryTransformer

Stores = dict[int, Store]


def placed_memories(model: MemoryTransformer) -> Iterator[tuple[int, ExternalMemory]]:
    """Each external memory with the place of its state in `MemoryState.banks`; none for other models."""
    for layer, places in model.places.items():
        for place, memory in zip(places, model.block(layer).kinds(), strict=True):
            if isinstance(memory, ExternalMemory):
                yield place, memory


def external_memories(model: MemoryTransformer) -> dict[int, list[ExternalMemory]]:
    """The model's external memories by the place of their state; ValueError where there are none."""
    found: dict[int, list[ExternalMemory]] = {}
    for place, memory in placed_memories(model):
        found.setdefault(place, []).append(memory)
    if not found:
        raise ValueError("this model has no external memory: set memory.kinds: [external]")
    return found


def attach_stores(
    model: MemoryTransformer,
    folder: str | os.PathLike[str] | None = None,
    index: IndexConfig | None = None,
) -> Stores:
    """Give every external memory a store; the stores by the place of their state.

    folder: where they are opened from if they were saved there. index: how they search, the
    configuration's if None. Raises ValueError for a model without external memory or stores of another
    one's sizes, StoreError for damaged files.
    """
    stores: Stores = {}
    sketches = encoder_sketches(model)
    for place, memories in external_memories(model).items():
        path = Path(folder or "", f"bank-{place}")
        weight, config = memories[0].v_proj.weight, memories[0].config
        if folder is not None and (path / MANIFEST).exists():
            store = open_store(path, index or config.index)
        else:
            dtype = str(weight.dtype).removeprefix("torch.")
            store = Store(shape_for(config, weight.shape[0], dtype), index or config.index)
        for memory in memories:
            memory.attach(store)
        store.note_encoder(sketches[place])
        stores[place] = store
    return stores


def detach_stores(model: MemoryTransformer) -> None:
    """Let the memories keep their pairs in their states again."""
    for memories in external_memories(model).values():
        for memory in memories:
            memory.attach(None)


def save_stores(stores: Stores, folder: str | os.PathLike[str]) -> None:
    """Save each store into its own folder; each is whole or as it was before."""
    for place, store in stores.items():
        save_store(store, Path(folder, f"bank-{place}"))


def forget_streams(model: MemoryTransformer, state: MemoryState) -> None:
    """Drop from attached stores all that the streams of a state have filed; the state is then unreadable.

    Earlier states of the same streams are too. A model without stores has nothing to drop.
    """
    for place, memory in placed_memories(model):
        if isinstance(memory.shelf, StoreShelf):
            for stream in cast(StoredState, state.banks[place]).stream.tolist():
                memory.shelf.store.forget(stream)


def attached_stores(model: MemoryTransformer) -> list[Store]:
    """The stores that memories of the model keep their pairs in, each once; none without."""
    shelves = [memory.shelf for _, memory in placed_memories(model)]
    stores = {id(shelf.store): shelf.store for shelf in shelves if isinstance(shelf, StoreShelf)}
    return list(stores.values())


@contextmanager
def forgetting_on_failure(model: MemoryTransformer) -> Iterator[None]:
    """Drop from attached stores the streams that were begun inside, if it raises: nobody knows them.

    What was appended to older streams stays, behind every cursor that is known.
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
def encoder_sketches(model: MemoryTransformer) -> dict[int, Tensor]:
    """The keys that the model makes today of one fixed segment, by place of the state: [h n k]."""
    memories = external_memories(model)
    shelves = {place: [memory.shelf for memory in group] for place, group in memories.items()}
    n, vocab = model.config.model.segment_length, model.config.model.vocab_size
    tokens = torch.arange(n, device=model.embedding.weight.device) * max(1, vocab // n) % vocab
    detach_stores(model)
    try:
        with evaluating(model):
            banks = model(tokens[None]).memory_state.banks
        return {place: banks[place].keys[0, :, :n].cpu() for place in memories}
    finally:
        for place, group in memories.items():
            for memory, shelf in zip(group, shelves[place], strict=True):
                memory.shelf = shelf


def stale_report(model: MemoryTransformer) -> dict[int, list[StaleKeys]]:
    """For each attached store: rows by the encoder that made their keys, and how far that one is off."""
    sketches = encoder_sketches(model)
    return {
        place: stale_keys(group[0].shelf.store, sketches[place])
        for place, group in external_memories(model).items()
        if isinstance(group[0].shelf, StoreShelf)
    }
