"""The record of one stream in a store: growing columns, some of their rows in files, the rest in memory.

Axes: r rows (tokens) of a stream, m new rows, h heads, k width of a key or value, x requested rows.
"""

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
    """An array that grows at the end: [r ...].

    New rows go to a buffer that doubles when it is full, so the mean cost per row does not depend on the
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
        """Bytes of the rows in files and of the buffer, including its free part."""
        return sum(part.nbytes for part in (*self.mapped, self.buffer))

    def map(self, rows: Sequence[Tensor]) -> None:
        """Start an empty column with read-only rows that stay in files."""
        self.mapped = list(rows)

    @property
    def newest(self) -> Tensor:
        """The rows in memory, which may be modified in place: [r ...]."""
        return self.buffer[: self.filled]

    def append(self, rows: Tensor) -> None:
        """Append rows: [m ...]."""
        needed = self.filled + len(rows)
        if needed > len(self.buffer):
            wider = self.buffer.new_empty(max(needed, 2 * len(self.buffer)), *self.buffer.shape[1:])
            wider[: self.filled] = self.newest
            self.buffer = wider
        self.buffer[self.filled : needed] = rows
        self.filled = needed

    def keep(self, places: Tensor) -> None:
        """Delete all other rows; the buffer is reused."""
        rows = self.rows(0, len(self))[places]
        self.mapped, self.filled = [], 0
        self.append(rows)

    def pieces(self) -> Iterator[Tensor]:
        """Yield all rows in order, as one tensor per file and one for the buffer."""
        yield from self.mapped
        if self.filled:
            yield self.newest

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1; a view if they are in one piece."""
        found, first = [], 0
        for piece in self.pieces():
            part = piece[max(start - first, 0) : max(stop - first, 0)]
            if len(part):
                found.append(part)
            first += len(piece)
        return found[0] if len(found) == 1 else torch.cat([self.buffer[:0], *found])

    def take(self, place: Tensor) -> Tensor:
        """Gather rows separately for each head, from rows [r h k]; place: [h x] -> [h x k]."""
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
    """Indices of head h's rows after rows [r h k] are flattened to [(r h) k]: [h ...] -> [h ...]."""
    if len(place) == 1:
        return place
    return rearrange(
        rearrange(place, "h ... -> ... h") * len(place) + torch.arange(len(place)), "... h -> h ..."
    )


@dataclass(frozen=True)
class Shape:
    """Fixed sizes and options of a store; capacity: live rows of a stream, None for no limit."""

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
    """The rows of one stream.

    length: rows ever written; evicted: evicted rows that are still stored; forgotten: oldest cursor that can
    still be read.

    keys, values: [r h k]; means: mean key of each chunk [r/chunk h k], the keys themselves without chunks.
    All [r]: serial, the row's position in the stream; gone, the cursor at which it was evicted; retrieved,
    its total retrieval weight; encoder, index of the encoder that made its key. parts: the files with the
    first rows, and the rows in each (memlib.memory.external.storage).
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
        """Positions in the stream of given rows; computed without a look-up if no row is missing."""
        serial = self.serial.newest
        if not len(serial):
            return place
        first, last = int(serial[0]), int(serial[-1])
        return place + first if last - first + 1 == len(serial) else serial[place]

    def visible(self, cursor: int) -> Tensor | None:
        """Mask of the rows visible at a cursor: [r], or None for all."""
        if cursor == self.length and not self.evicted:
            return None
        return (self.serial.newest < cursor) & (self.gone.newest > cursor)

    @property
    def tables(self) -> tuple[Column, ...]:
        """The columns with one value per row."""
        return self.serial, self.gone, self.retrieved, self.encoder

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, without FAISS indexes."""
        means = () if self.means is self.keys else (self.means,)
        return sum(column.nbytes for column in (self.keys, self.values, *means, *self.tables))

    @property
    def live(self) -> Tensor:
        return self.gone.newest == NEVER
