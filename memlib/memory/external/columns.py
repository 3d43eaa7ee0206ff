"""What a store keeps of one stream: growing columns, some of their rows in files, the rest in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from memlib.memory.external.index import SearchIndex

NEVER = torch.iinfo(torch.int64).max


class Column:
    """Rows of one shape, appended at the end: [r ...].

    What is appended goes to a buffer that doubles when it is full, so that a row costs the same at any
    size.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.mapped: list[Tensor] = []
        self.buffer = torch.empty(0, *shape, dtype=dtype)
        self.filled = 0

    def __len__(self) -> int:
        return sum(len(part) for part in self.mapped) + self.filled

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in files and of the buffer, with what of it is still free."""
        return sum(part.nbytes for part in (*self.mapped, self.buffer))

    def map(self, rows: Sequence[Tensor]) -> None:
        """Begin an empty column with rows that live in files and stay there, read-only."""
        self.mapped = list(rows)

    @property
    def newest(self) -> Tensor:
        """The rows in memory, which may be changed in place: [r ...]."""
        return self.buffer[: self.filled]

    def append(self, rows: Tensor) -> None:
        """Add rows at the end: [m ...]."""
        needed = self.filled + len(rows)
        if needed > len(self.buffer):
            wider = self.buffer.new_empty(max(needed, 2 * len(self.buffer)), *self.buffer.shape[1:])
            wider[: self.filled] = self.newest
            self.buffer = wider
        self.buffer[self.filled : needed] = rows
        self.filled = needed

    def keep(self, places: Tensor) -> None:
        """Drop all other rows, where they lie: the buffer neither grows nor moves."""
        rows = self.rows(0, len(self))[places]
        self.mapped, self.filled = [], 0
        self.append(rows)

    def pieces(self) -> Iterator[Tensor]:
        """All rows in order, in as many tensors as they lie in."""
        yield from self.mapped
        if self.filled:
            yield self.newest

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1; a view where they lie in one piece."""
        found, first = [], 0
        for piece in self.pieces():
            part = piece[max(start - first, 0) : max(stop - first, 0)]
            if len(part):
                found.append(part)
            first += len(piece)
        return found[0] if len(found) == 1 else torch.cat([self.buffer[:0], *found])

    def take(self, place: Tensor) -> Tensor:
        """Head h's part of the rows it asks for; of rows [h k], place: [h x] -> [h x k]."""
        found, first = None, 0
        for piece in self.pieces():
            inside = (place - first).clamp_(0, len(piece) - 1) if self.mapped else place
            lines = rearrange(lines_of_heads(inside), "h x -> (h x)")
            part = rearrange(piece, "r h k -> (r h) k").index_select(0, lines)
            part = rearrange(part, "(h x) k -> h x k", h=len(place))
            if found is None:
                found = part
            else:
                found = torch.where(rearrange(place >= first, "h x -> h x 1"), part, found)
            first += len(piece)
        return self.buffer.new_zeros(*place.shape, self.buffer.shape[-1]) if found is None else found


def lines_of_heads(place: Tensor) -> Tensor:
    """Where head h's part of each row stands once rows [r h k] are lines [(r h) k]: [h ...] -> [h ...]."""
    if len(place) == 1:
        return place
    return rearrange(
        rearrange(place, "h ... -> ... h") * len(place) + torch.arange(len(place)), "... h -> h ..."
    )


@dataclass(frozen=True)
class Shape:
    """What a store holds, fixed for its life. capacity: live rows of a stream, null without a limit."""

    heads: int
    key_dim: int
    value_dim: int
    capacity: int | None = None
    eviction: Literal["oldest", "least_retrieved"] = "oldest"
    chunk: int = 1
    dtype: str = "float32"

    def column(self, dim: int) -> Column:
        return Column((self.heads, dim), getattr(torch, self.dtype))


@dataclass
class StreamRecord:
    """One stream's rows. `length` counts all that were ever written, `evicted` those of the rows here that
    are gone; `forgotten` is the oldest cursor that can still be read.

    keys, values: [r h k]; means: a chunk's mean key [r/chunk h k], the keys themselves without chunks;
    serial: which token of the stream a row is; gone: the cursor from which it is evicted; retrieved:
    with what weight it came back; encoder: which of the store's encoders made its key. All [r].
    parts: the files that hold the first rows, and how many each (memlib.memory.external.storage).
    """

    keys: Column
    values: Column
    means: Column
    serial: Column = field(default_factory=lambda: Column((), torch.int64))
    gone: Column = field(default_factory=lambda: Column((), torch.int64))
    retrieved: Column = field(default_factory=lambda: Column((), torch.float64))
    encoder: Column = field(default_factory=lambda: Column((), torch.int64))
    length: int = 0
    forgotten: int = 0
    evicted: int = 0
    indexes: list[SearchIndex] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)

    def serials(self, place: Tensor) -> Tensor:
        """Which tokens of the stream stand at places; a sum, not a look-up, where none is missing."""
        serial = self.serial.newest
        if not len(serial):
            return place
        first, last = int(serial[0]), int(serial[-1])
        return place + first if last - first + 1 == len(serial) else serial[place]

    def visible(self, cursor: int) -> Tensor | None:
        """Which rows a reader at this cursor sees: [r], or None for all."""
        if cursor == self.length and not self.evicted:
            return None
        return (self.serial.newest < cursor) & (self.gone.newest > cursor)

    @property
    def tables(self) -> tuple[Column, ...]:
        """The columns with a row for each token, keys and values aside."""
        return self.serial, self.gone, self.retrieved, self.encoder

    @property
    def nbytes(self) -> int:
        """Bytes of all columns; indexes, which FAISS keeps, come on top."""
        means = () if self.means is self.keys else (self.means,)
        return sum(column.nbytes for column in (self.keys, self.values, *means, *self.tables))

    @property
    def live(self) -> Tensor:
        return self.gone.newest == NEVER
