"""A store of key-value pairs: many streams, searched by similarity, optionally saved to disk.

Axes: h heads, r rows (tokens or chunks) of a stream, m new rows, n queries, j hits, k width, c tokens of a
chunk.

Streams grow only at their end, and every read or write names a cursor: the pair (stream, cursor) has value
semantics. A read at a cursor sees the stream as it was at that length, even after later writes. A write at a
cursor before the end writes to a copy of the stream up to the cursor. So a model with a store still obeys the
laws: its state is two integers per row of the batch.

Below `index.exact_below` rows the search is exact, with torch. Above, a FAISS index for each stream and head
proposes candidates, rows that it does not cover yet are compared exactly, and all candidates are ranked by
their true scores. With chunk > 1 the search compares the mean key of each chunk and retrieves whole chunks
(LongMem); only complete chunks can be retrieved.

A store is in memory; memlib.memory.external.storage saves it, and opens it with memory-mapped rows.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

from memlib.config import IndexConfig
from memlib.memory.external.columns import NEVER, Column, Shape, StreamRecord, lines_of_heads
from memlib.memory.external.index import LEAST, SearchIndex, products_at
from memlib.ops import chunk_places, exact_search


class StoreError(RuntimeError):
    """A store cannot be read, or cannot serve a request; the message names the cause and the remedy."""


class Hits(NamedTuple):
    """Retrieved rows, best first: serial [h n j], -1 for no hit; score [h n j], inner product with the query;
    values, keys: [h n j k]; keys is None if not requested."""

    serial: Tensor
    score: Tensor
    values: Tensor
    keys: Tensor | None


class Store:
    """Key-value pairs of many streams: append, search, evict, fork, forget."""

    def __init__(self, shape: Shape, index: IndexConfig | None = None) -> None:
        self.shape, self.index = shape, index or IndexConfig()
        self.streams: dict[int, StreamRecord] = {}
        self.next_stream = 0
        self.encoders: list[Tensor] = []
        self.saved: tuple[Path, dict[str, Any]] | None = None

    def new_stream(self) -> int:
        """Create an empty stream and return its number."""
        self.next_stream += 1
        return self.next_stream - 1

    def __len__(self) -> int:
        """Live rows of all streams."""
        return sum(int(stream.live.sum()) for stream in self.streams.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type of keys, values and scores."""
        return getattr(torch, self.shape.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all streams' columns, in memory and in files."""
        return sum(stream.nbytes for stream in self.streams.values())

    def forget(self, stream: int) -> None:
        """Delete all rows of a stream; cursors into it become unreadable."""
        kept = self.streams.get(stream)
        if kept is not None:
            self.streams[stream] = self.empty()
            self.streams[stream].length = self.streams[stream].forgotten = kept.length

    def empty(self) -> StreamRecord:
        keys = self.shape.column(self.shape.key_dim)
        means = keys if self.shape.chunk == 1 else self.shape.column(self.shape.key_dim)
        return StreamRecord(keys, self.shape.column(self.shape.value_dim), means)

    def at(self, number: int, cursor: int) -> StreamRecord:
        """The record of a stream; raises StoreError if it cannot be read at this cursor."""
        if not 0 <= number < self.next_stream:
            raise StoreError(f"stream {number}: the streams of this store are 0 … {self.next_stream - 1}")
        if number not in self.streams:
            self.streams[number] = self.empty()
        stream = self.streams[number]
        if not stream.forgotten <= cursor <= stream.length:
            raise StoreError(
                f"stream {number} at {cursor}: readable from {stream.forgotten} to {stream.length}; "
                "continue from a newer state, or raise capacity"
            )
        return stream

    # ---------------------------------------------------------------------------------------- writing

    @torch.no_grad()
    def append(
        self, number: int, cursor: int, keys: Tensor, values: Tensor, retrieved: Tensor | None = None
    ) -> tuple[int, int]:
        """Write rows at a cursor; keys, values: [h m k] -> the (stream, cursor) after the write.

        retrieved: [r], retrieval weights since the last write, from `weights`; least_retrieved needs them.
        """
        stream = self.at(number, cursor)
        if cursor < stream.length:
            number, stream = self.fork(stream, cursor)
        if retrieved is not None:
            stream.retrieved.newest.add_(retrieved[: len(stream.serial)])  # a copy has the first rows
        m = keys.shape[1]
        stream.keys.append(rearrange(keys, "h m k -> m h k"))
        stream.values.append(rearrange(values, "h m k -> m h k"))
        stream.serial.append(torch.arange(cursor, cursor + m))
        stream.gone.append(torch.full((m,), NEVER))
        stream.retrieved.append(torch.zeros(m, dtype=torch.float64))
        stream.encoder.append(torch.full((m,), len(self.encoders) - 1))
        stream.length += m
        self.complete_chunks(stream)
        self.evict(stream, m)
        return number, stream.length

    def complete_chunks(self, stream: StreamRecord) -> None:
        """Compute the mean key of every newly completed chunk."""
        c = self.shape.chunk
        if c > 1:
            done = len(stream.means)
            keys = stream.keys.rows(done * c, len(stream.keys) // c * c)
            stream.means.append(reduce(keys, "(r c) h k -> r h k", "mean", c=c))

    def evict(self, stream: StreamRecord, added: int) -> None:
        """Mark rows above the capacity as evicted, oldest or least retrieved first, new rows last.

        Evicted rows are deleted when they are about half of all rows.
        """
        live = torch.nonzero(stream.live).flatten()
        excess = len(live) - (self.shape.capacity or len(live))
        if excess <= 0:
            return
        old = live[: len(live) - added]
        if self.shape.eviction == "least_retrieved":
            old = old[torch.argsort(stream.retrieved.newest[old], stable=True)]
        stream.gone.newest[torch.cat((old, live[len(old) :]))[:excess]] = stream.length
        stream.evicted += excess
        if len(stream.serial) + added > 2 * (len(live) - excess):  # so that the buffers need not grow
            self.drop_gone(stream)

    def drop_gone(self, stream: StreamRecord) -> None:
        """Delete evicted rows, in whole chunks; older cursors become unreadable."""
        c = self.shape.chunk
        live = F.pad(stream.live, (0, -len(stream.live) % c))
        kept = repeat(reduce(live, "(r c) -> r", "any", c=c), "r -> (r c)", c=c)[: len(stream.live)]
        places = torch.nonzero(kept).flatten()
        for column in (stream.keys, stream.values, *stream.tables):
            column.keep(places)
        if c > 1:
            chunks = places[::c] // c
            stream.means.keep(chunks[chunks < len(stream.means)])
        stream.indexes, stream.parts = [], []
        stream.evicted = int((~stream.live).sum())
        stream.forgotten = stream.length

    def fork(self, stream: StreamRecord, cursor: int) -> tuple[int, StreamRecord]:
        """Copy a stream up to a cursor into a new stream."""
        number = self.new_stream()
        copy = self.copied(stream, torch.nonzero(stream.serial.newest < cursor).flatten())
        copy.length = cursor
        copy.gone.newest[copy.gone.newest > cursor] = NEVER
        copy.evicted = int((~copy.live).sum())
        self.streams[number] = copy
        return number, copy

    def copied(self, stream: StreamRecord, places: Tensor) -> StreamRecord:
        """Copy some rows, in order, into a new record; its indexes are built when needed."""
        copy = self.empty()
        for name in ("keys", "values"):
            rows = getattr(stream, name).rows(0, len(stream.serial))
            getattr(copy, name).append(rows[places])
        for name in ("serial", "gone", "retrieved", "encoder"):
            getattr(copy, name).append(getattr(stream, name).newest[places])
        copy.length, copy.forgotten = stream.length, stream.forgotten
        copy.evicted = int((~copy.live).sum())
        self.complete_chunks(copy)
        return copy

    # ---------------------------------------------------------------------------------------- reading

    @torch.no_grad()
    def search(self, number: int, cursor: int, query: Tensor, top_k: int, keys: bool = True) -> Hits:
        """Retrieve the top_k rows nearest to each query among those visible at a cursor, best first.

        query: [h n k] -> always top_k hits, with serial -1 if there are fewer rows. top_k must be a multiple
        of the chunk. keys: whether to return the hits' keys, needed only for gradients through the scores.
        Raises StoreError for a cursor that cannot be read.
        """
        stream, c = self.at(number, cursor), self.shape.chunk
        query = query.to(self.dtype)
        score, place = self.nearest(stream, cursor, query, top_k // c)
        if c > 1:
            place = chunk_places(place, c)
            score = self.true_scores(stream.keys, query, place)
        missing = top_k - place.shape[-1]
        if missing:
            score, place = F.pad(score, (0, missing)), F.pad(place, (0, missing), value=-1)
        there, none = place, place < 0
        if bool(none.any()):
            there, score = place.clamp(min=0), score.masked_fill(none, -torch.inf)
        serial = stream.serials(there)
        return Hits(
            serial if there is place else serial.masked_fill_(none, -1),
            score,
            self.rows_at(stream.values, there),
            self.rows_at(stream.keys, there) if keys else None,
        )

    def rows_at(self, column: Column, place: Tensor) -> Tensor:
        """Gather rows separately for each head: [h n j] -> [h n j k]; zeros if the column is empty."""
        rows = column.take(rearrange(place, "h n j -> h (n j)"))
        return rearrange(rows, "h (n j) k -> h n j k", n=place.shape[1])

    def nearest(self, stream: StreamRecord, cursor: int, query: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Scores and indices of the nearest rows (or chunks), best first, -1 for none: [h n j]."""
        rows, c = len(stream.means), self.shape.chunk
        seen = stream.visible(cursor)
        if c > 1 and seen is not None:
            seen = reduce(seen[: rows * c], "(r c) -> r", "all", c=c)
        if rows < max(self.index.exact_below, LEAST):
            return self.nearest_exactly(stream, seen, query, top_k)
        return self.nearest_by_index(stream, seen, query, top_k)

    def nearest_exactly(
        self, stream: StreamRecord, seen: Tensor | None, query: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """The nearest rows by exhaustive comparison."""
        scores = [einsum(query, piece, "h n k, r h k -> h n r") for piece in stream.means.pieces()]
        if not scores:
            return query[..., :0], torch.empty(*query.shape[:2], 0, dtype=torch.int64)
        score = rearrange(torch.cat(scores, -1), "h n r -> 1 h n r")
        serial = stream.serial.newest[:: self.shape.chunk][: score.shape[-1]]
        if seen is not None:
            serial = torch.where(seen, serial, -1)
        place = exact_search(score, rearrange(serial, "r -> 1 r"), min(top_k, len(serial)))[0]
        return score[0].gather(-1, place.clamp(min=0)), place

    def nearest_by_index(
        self, stream: StreamRecord, seen: Tensor | None, query: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """The nearest rows among the candidates of each head's index and the rows it does not cover yet."""
        if not stream.indexes:
            stream.indexes = [SearchIndex(self.index, self.shape.key_dim) for _ in range(self.shape.heads)]
        h, n, _ = query.shape
        score, place = torch.empty(h, n, top_k), torch.empty(h, n, top_k, dtype=torch.int64)
        for head, index in enumerate(stream.indexes):
            index.cover(len(stream.means), partial(head_rows, stream.means, head))
            mask = None if seen is None else seen[: index.size].numpy()
            into = score[head].numpy(), place[head].numpy()
            index.search(query[head].float().numpy(), top_k, mask, into)
        covered, rows = stream.indexes[0].size, len(stream.means)
        if self.index.kind == "ivfpq":  # its scores are of compressed keys
            score = self.true_scores(stream.means, query, place)
        elif covered == rows:
            return score, place
        if covered < rows:
            newer = torch.arange(covered, rows)
            if seen is not None:
                newer = torch.where(seen[covered:], newer, -1)
            newer_score = einsum(query, stream.means.rows(covered, rows), "h n k, r h k -> h n r")
            score = torch.cat((score, newer_score.masked_fill_(newer < 0, -torch.inf)), -1)
            place = torch.cat((place, newer.expand_as(newer_score)), -1)
        score, best = score.topk(top_k, -1)
        return score, place.gather(-1, best)

    def true_scores(self, column: Column, query: Tensor, place: Tensor) -> Tensor:
        """Inner products of queries with rows at given indices, -inf at -1: [h n k], [h n j] -> [h n j]."""
        none, pieces = place < 0, list(column.pieces())
        if query.dtype == torch.float32 and len(pieces) == 1:
            rows, lines = rearrange(pieces[0], "r h k -> (r h) k"), lines_of_heads(place)
            return products_at(query, rows, lines.masked_fill(none, -1))
        rows = self.rows_at(column, place.clamp(min=0))
        if query.dtype == torch.float32:  # bitwise equal to the result for rows in one piece
            h, n, j = place.shape
            lines = rearrange(torch.arange(place.numel()), "(h n j) -> h n j", h=h, n=n, j=j)
            return products_at(query, rearrange(rows, "h n j k -> (h n j) k"), lines.masked_fill(none, -1))
        return einsum(query, rows, "h n k, h n j k -> h n j").masked_fill_(none, -torch.inf)

    def weights(self, number: int, cursor: int, serial: Tensor, weight: Tensor) -> Tensor:
        """Sum the retrieval weights of each row, for `append`; serial, weight: [h n j] -> [r]."""
        stream = self.at(number, cursor)
        place = torch.searchsorted(stream.serial.newest, serial.clamp(min=0).flatten())
        total = torch.zeros(len(stream.serial), dtype=torch.float64)
        there = (weight * (serial >= 0)).flatten().double()
        return total.index_add_(0, place, there) if len(total) else total

    def note_encoder(self, sketch: Tensor) -> None:
        """Record the encoder of all later keys by its sketch, its keys for fixed inputs: [... k]."""
        sketch = sketch.detach().float().clone()
        if not self.encoders or not torch.equal(self.encoders[-1], sketch):
            self.encoders.append(sketch)


def head_rows(column: Column, head: int, start: int, stop: int) -> np.ndarray:
    """One head's rows for FAISS: [m k] float32, contiguous."""
    return np.ascontiguousarray(column.rows(start, stop)[:, head].float().numpy())
