"""`State`: what a memory remembers, as a value.

A state is a frozen dataclass of tensors that names the axes of each field once:

    @dataclass(frozen=True)
    class SlotState(State):
        slots: Tensor = axes("batch slot feature")

Detaching, resetting rows, moving, saving, counting bytes, labelling and checking are written here, for
every state. A state is a pytree node, so that it passes through torch.compile, torch.export, gradient
checkpointing and FSDP like a tuple of tensors.

Axes: b rows of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.utils import _pytree as pytree

FREE_AXES = ("batch", "token")  # their sizes may differ between two states of one memory


def axes(names: str) -> Any:
    """A field of a `State` by the names of its axes; the first one is `batch`.

    For a tuple of tensors they are the axes of each. `token` is an axis whose size changes while a
    segment is open; all others have one size for the life of a memory.
    """
    return field(metadata={"axes": tuple(names.split())})


@dataclass(frozen=True)
class State:
    """Frozen tensors whose first axis is the batch; a field is a Tensor, a State or a tuple of them.

    A subclass only declares its fields. Nothing is changed in place: every method returns a new State.
    TypeError for a tensor without `axes` and for a field that is named like a method of `State`.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, kind in inspect.get_annotations(cls).items():
            if hasattr(State, name):
                raise TypeError(f"{cls.__name__}.{name}: State has a method of that name; choose another")
            if "Tensor" in str(kind) and not _axes_of(cls.__dict__.get(name)):
                raise TypeError(
                    f'{cls.__name__}.{name}: name its axes, e.g. {name}: Tensor = axes("batch slot feature")'
                )
        _register(cls)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same structure with `change` applied to every tensor."""
        return replace(self, **{f.name: _map(getattr(self, f.name), change) for f in fields(self)})

    def zip(self, other: Self, change: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """The same structure with `change` applied to every pair of tensors of the two states."""
        pairs = iter([tensor for _, tensor in other.named_tensors()])
        return self.map(lambda tensor: change(tensor, next(pairs)))

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(dotted name, tensor) of every tensor, in a fixed order."""
        for name, tensor, _ in self.labelled_tensors(prefix):
            yield name, tensor

    def labelled_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
        """(dotted name, tensor, names of its axes) of every tensor, in the order of `named_tensors`."""
        for f in fields(self):
            yield from _labelled(getattr(self, f.name), f"{prefix}{f.name}", _axes_of(f))

    def detach(self) -> Self:
        """The same values, cut off from the graph: where truncated backpropagation ends."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """`Tensor.to` for every tensor."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def cast(self, dtype: torch.dtype) -> Self:
        """Floating point tensors in another type; the others as they are."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def clone(self) -> Self:
        return self.map(Tensor.clone)

    def rows(self, index: Tensor) -> Self:
        """The given rows of the batch, in that order; index: [r] integers."""
        return self.map(lambda tensor: tensor.index_select(0, index))

    def join(self, *others: Self) -> Self:
        """One batch of this state's rows and then the others', in that order."""
        named = iter(zip(*(state.named_tensors() for state in (self, *others)), strict=True))
        return self.map(lambda _: torch.cat([tensor for _, tensor in next(named)]))

    def where(self, rows: Tensor, other: Self) -> Self:
        """This state where rows: [b] is true, the other elsewhere."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            pattern = "b -> b " + "1 " * (mine.ndim - 1)
            return torch.where(rearrange(rows, pattern), mine, theirs)

        return self.zip(other, choose)

    def load(self, tensors: Mapping[str, Tensor]) -> Self:
        """This structure with the named tensors' values, as `named_tensors` names them."""
        names = [name for name, _ in self.named_tensors()]
        if missing := [name for name in names if name not in tensors]:
            raise KeyError(
                f"memory state lacks {missing[0]!r} ({len(missing)} of {len(names)} tensors missing); "
                "it was saved by a model with another configuration"
            )
        values = iter(names)
        return self.map(lambda _: tensors[next(values)])

    @property
    def layout(self) -> Layout:
        """What two states of one memory have in common."""
        return Layout(
            type(self).__name__,
            tuple(
                (name, labels, tuple(tensor.shape), tensor.is_floating_point())
                for name, tensor, labels in self.labelled_tensors()
            ),
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named_tensors())


@dataclass(frozen=True)
class Layout:
    """The kind of a state and, for each tensor, (name, axes, sizes, whether it holds real numbers)."""

    kind: str
    tensors: tuple[tuple[str, tuple[str, ...], tuple[int, ...], bool], ...]

    def check(self, state: object, name: str) -> None:
        """Raise ValueError unless a state has this layout; sizes of `batch` and `token` are free."""
        if not isinstance(state, State) or type(state).__name__ != self.kind:
            raise ValueError(
                f"{name} is a {type(state).__name__}: this model expects {self.kind} there; the state is of "
                "another model, start from None"
            )
        found = state.layout.tensors
        if [row[0] for row in found] != [row[0] for row in self.tensors]:
            raise ValueError(
                f"{name} holds {', '.join(row[0] for row in found) or 'nothing'}: this model expects "
                f"{', '.join(row[0] for row in self.tensors) or 'nothing'}; start from None"
            )
        for (tensor, labels, shape, real), (_, _, other, other_real) in zip(self.tensors, found, strict=True):
            fits = len(shape) == len(other) and all(
                axis in FREE_AXES or mine == theirs
                for axis, mine, theirs in zip(labels, shape, other, strict=True)
            )
            if not fits or real != other_real:
                sizes = ", ".join(
                    axis if axis in FREE_AXES else f"{axis} {size}"
                    for axis, size in zip(labels, shape, strict=True)
                )
                kinds = "" if real == other_real else f" of {'real numbers' if real else 'integers'}"
                raise ValueError(
                    f"{name}.{tensor} has shape {list(other)}: this model expects [{sizes}]{kinds}; the "
                    "state is of another model or configuration, start from None"
                )


def _axes_of(f: Any) -> tuple[str, ...]:
    return getattr(f, "metadata", {}).get("axes", ())


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(v, change) for v in value)
    return value.map(change)


def _labelled(
    value: Any, name: str, labels: tuple[str, ...]
) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    if isinstance(value, Tensor):
        yield name, value, labels
    elif isinstance(value, tuple):
        for i, v in enumerate(value):
            yield from _labelled(v, f"{name}.{i}", labels)
    else:
        yield from value.labelled_tensors(f"{name}.")


def _register(kind: type[State]) -> None:
    """Make a State a pytree node whose children are its fields."""

    def names() -> list[str]:
        return [f.name for f in fields(kind)]

    def flatten(state: State) -> tuple[list[Any], None]:
        return [getattr(state, name) for name in names()], None

    def flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], None]:
        return [(pytree.GetAttrKey(name), getattr(state, name)) for name in names()], None

    pytree.register_pytree_node(
        kind,
        flatten,
        lambda children, _: kind(*children),
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        to_dumpable_context=lambda _: "",
        from_dumpable_context=lambda _: None,
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(State)
