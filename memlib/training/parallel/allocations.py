"""Count the bytes of all tensors that live at the same time, of real or fake tensors alike.

Results of operations are recorded as allocations of their storage, and the end of a storage as its release.
Tensors that exist only inside one operator of torch are not seen, nor are gaps in an allocator's blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from itertools import count
from types import TracebackType
from typing import Any, Self

from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memlib.training.parallel.ranks import local


class Allocations(TorchDispatchMode):
    """Record allocations and releases while it is entered.

    >>> with Allocations() as allocations:
    ...     model(ids).logits.sum().backward()
    >>> allocations.peak({"gradients": allocations.of(p.grad for p in model.parameters())})

    events: (storage's number, bytes more or fewer), in order; resized: storages that were emptied or filled
    by `resize_`, which FSDP does with the parameters that it gathers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.resized: set[int] = set()
        self._number = count()
        self._known: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}  # by id: storage, its number
        self._bytes: dict[int, int] = {}  # by number

    def __enter__(self) -> Self:
        super().__enter__()
        self._resize = resize = UntypedStorage.resize_

        def resize_(storage: UntypedStorage, size: int) -> Any:
            number = self._note(storage)
            result = resize(storage, size)
            self.resized.add(number)
            self._change(number, storage.nbytes())
            return result

        UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operation on local tensors follows, and is recorded
        result = function(*args, **(kwargs or {}))
        self.hold(tree_leaves(result))
        return result

    def hold(self, tensors: Iterable[Any]) -> None:
        """Record tensors that exist already."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._note(storage_of(tensor))

    def of(self, tensors: Iterable[Tensor | None]) -> set[int]:
        """The numbers of tensors' storages."""
        return {self._note(storage_of(tensor)) for tensor in tensors if tensor is not None}

    def peak(self, kinds: Mapping[str, set[int]]) -> dict[str, int]:
        """Bytes of each kind of storages, and of all others ("rest"), when the most are held."""
        kind_of = {number: kind for kind, numbers in kinds.items() for number in numbers}
        now = dict.fromkeys([*kinds, "rest"], 0)
        total, highest, found = 0, -1, dict(now)
        for number, change in self.events:
            now[kind_of.get(number, "rest")] += change
            total += change
            if total > highest:
                highest, found = total, dict(now)
        return found

    def _note(self, storage: UntypedStorage) -> int:
        """The number of a storage, which is recorded if it is new."""
        key = id(storage)
        if key in self._known and self._known[key][0]() is storage:
            return self._known[key][1]
        number = next(self._number)
        self._known[key] = weakref.ref(storage, lambda _: self._release(key, number)), number
        self._change(number, storage.nbytes())
        return number

    def _release(self, key: int, number: int) -> None:
        if key in self._known and self._known[key][1] == number:
            del self._known[key]
        self._change(number, 0)

    def _change(self, number: int, size: int) -> None:
        before = self._bytes.get(number, 0)
        if size != before:
            self.events.append((number, size - before))
        self._bytes[number] = size


def storage_of(tensor: Tensor) -> UntypedStorage:
    """The storage of a tensor, or of this process's part of it."""
    return local(tensor).untyped_storage()


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this process's part of tensors; a storage counts once."""
    storages = {id(s): s for s in map(storage_of, tensors)}
    return sum(s.nbytes() for s in storages.values())
