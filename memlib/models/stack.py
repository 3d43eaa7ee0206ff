"""Which layers have which memories, which of them share a state, and where each state is.

A `MemoryStack` has no parameters and does not know a transformer: a model, an adapter and a pipeline stage
all use it, whatever runs the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from memlib.memory.base import Memory, State
from memlib.memory.layer import LayerMemories

States = tuple[State, ...]


class MemoryStack:
    """The memories of some layers and the slots of their states.

    layers: layer -> its memories; groups: layer -> the group of layers it shares with. Memories of one kind
    in layers of one group share a state if their kind shares states, and always the modules that
    `Memory.share` passes on. `slots` maps a layer to the index of each of its memories' states.
    """

    def __init__(self, layers: Mapping[int, LayerMemories], groups: Mapping[int, int]) -> None:
        self.layers = {layer: memories for layer, memories in layers.items() if len(memories)}
        self.slots: dict[int, list[int]] = {}
        numbers: dict[tuple[int, str], int] = {}
        first: dict[tuple[int, str], Memory] = {}
        for layer, memories in self.layers.items():
            self.slots[layer] = []
            for kind, memory in zip(memories, memories.memory_list, strict=True):
                memory.share(first.setdefault((groups[layer], kind), memory))
                # A layer that keeps its state to itself counts as a group of its own, below zero.
                owner = groups[layer] if memory.shares_state else -1 - layer
                self.slots[layer].append(numbers.setdefault((owner, kind), len(numbers)))

    def __iter__(self) -> Iterator[tuple[int, int, Memory]]:
        """(layer, slot of its state, memory) of every memory, in the order in which they write."""
        for layer, slots in self.slots.items():
            for slot, memory in zip(slots, self.layers[layer].memory_list, strict=True):
                yield layer, slot, memory

    def by_slot(self) -> dict[int, Memory]:
        """For each state, the first memory that uses it."""
        found: dict[int, Memory] = {}
        for _, slot, memory in self:
            found.setdefault(slot, memory)
        return dict(sorted(found.items()))

    def init_state(self, batch_size: int) -> States:
        """The states of streams that have seen nothing."""
        return tuple(memory.init_state(batch_size) for memory in self.by_slot().values())

    def at(self, layer: int, states: Sequence[State]) -> list[State]:
        """The states of one layer's memories."""
        return [states[slot] for slot in self.slots[layer]]

    def put(self, layer: int, states: list[State], new: Sequence[State]) -> None:
        """Replace one layer's states in a list of all."""
        for slot, state in zip(self.slots[layer], new, strict=True):
            states[slot] = state

    def check(self, states: Sequence[State], name: str) -> None:
        """Raise ValueError, with the tensor's name, shape and what is expected, unless states fit."""
        memories = self.by_slot()
        if len(states) != len(memories):
            raise ValueError(
                f"{name} holds {len(states)} states, this model has {len(memories)}: the state is of another "
                "model, start from None"
            )
        for slot, memory in memories.items():
            memory.check_state(states[slot], f"{name}.{slot}")
