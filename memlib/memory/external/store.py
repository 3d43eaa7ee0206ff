"""A store of key-value pairs: many streams, searched by similarity, kept on disk.

Axes: h heads, r rows (tokens) of a stream, m new rows, n queries, j hits, k width.

A store only grows at the end of a stream, and whoever reads or writes says up to where: (stream, cursor)
is a value. A read at a cursor sees what was there when the stream had that length, also after others
have written on; a write at a cursor that is not the end goes on in a copy of the stream up to there. So
a model whose memory is a store still obeys the laws: its state is two integers for each row.

Search is exact by torch below `index.exact_below` rows. Above, a FAISS index for each stream and head
proposes candidates, what it does not cover yet is compared exactly, and all candidates are ranked by
their true scores. With chunk > 1 the mean of a chunk's keys is searched and whole chunks come
back (LongMem); a chunk is found once it is complete.

A store lives in memory; memlib.memory.external.storage saves it, and opens it with its rows still on disk.
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
    """A store that cannot do what is asked, or cannot be read; the message says what and the remedy."""


class Hits(NamedTuple):
    """What came back, best first: serial [h n j], -1 where nothing did; score, the inner product with
    the query: [h n j]; values, keys: [h n j k]. keys: None where they were not asked for.
    """

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
        """The number of a stream that holds nothing yet."""
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
        """Drop all rows of a stream; cursors into it become unreadable."""
        kept = self.streams.get(stream)
        if kept is not None:
            self.streams[stream] = self.empty()
            self.streams[stream].length = self.streams[stream].forgotten = kept.length

    def empty(self) -> StreamRecord:
        keys = self.shape.column(self.shape.key_dim)
        means = keys if self.shape.chunk == 1 else self.shape.column(self.shape.key_dim)
        return StreamRecord(keys, self.shape.column(self.shape.value_dim), means)

    def at(self, number: int, cursor: int) -> StreamRecord:
        """The stream, once it is sure that it can be read at this cursor."""
        if not 0 <= number < self.next_stream:
            raise StoreError(f"stream {number}: this store has given out 0 … {self.next_stream - 1}")
        if number not in self.streams:
            self.streams[number] = self.empty()
        stream = self.streams[number]
        if not stream.forgotten <= cursor <= stream.length:
            raise StoreError(
                f"stream {number} at {cursor}: readable from {stream.forgotten} to {stream.length}; "
                "go on from a newer state, or raise capacity"
            )
        return stream

    # ---------------------------------------------------------------------------------------- writing

    @torch.no_grad()
    def append(
        self, number: int, cursor: int, keys: Tensor, values: Tensor, retrieved: Tensor | None = None
    ) -> tuple[int, int]:
        """Write rows behind a cursor; keys, values: [h m k] -> the (stream, cursor) after them.

        retrieved: [r], what `weights` gave for the reads since the last write; least_retrieved needs it.
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
        """Give every chunk that has become complete its mean key."""
        c = self.shape.chunk
        if c > 1:
            done = len(stream.means)
            keys = stream.keys.rows(done * c, len(stream.keys) // c * c)
            stream.means.append(reduce(keys, "(r c) h k -> r h k", "mean", c=c))

    def evict(self, stream: StreamRecord, added: int) -> None:
        """Mark what exceeds the capacity as gone, never the rows just added; drop it at about half."""
        live = torch.nonzero(stream.live).flatten()
        excess = len(live) - (self.shape.capacity or len(live))
        if excess <= 0:
            return
        old = live[: len(live) - added]
        if self.shape.eviction == "least_retrieved":
            old = old[torch.argsort(stream.retrieved.newest[old], stable=True)]
        stream.gone.newest[torch.cat((old, live[len(old) :]))[:excess]] = stream.length
        stream.evicted += excess
        if len(stream.serial) + added > 2 * (len(live) - excess):  # the next rows find room in the buffers
            self.drop_gone(stream)

    def drop_gone(self, stream: StreamRecord) -> None:
        """Free the rows that are gone, in whole chunks; older cursors become unreadable."""
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
        """A new stream that holds what a reader at this cursor sees."""
        number = self.new_stream()
        copy = self.copied(stream, torch.nonzero(stream.serial.newest < cursor).flatten())
        copy.length = cursor
        copy.gone.newest[copy.gone.newest > cursor] = NEVER
        copy.evicted = int((~copy.live).sum())
        self.streams[number] = copy
        return number, copy

    def copied(self, stream: StreamRecord, places: Tensor) -> StreamRecord:
        """A stream of some of the rows, in order; its indexes are built when they are needed."""
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
        """The top_k rows nearest to each query, best first, as a reader at this cursor sees them.

        query: [h n k] -> always top_k hits, serial -1 where there are fewer rows. top_k is a multiple
        of the chunk. keys: whether the hits' keys are wanted, which only a gradient through the scores
        needs. Raises StoreError for a cursor that cannot be read.
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
        """Head by head the rows at places: [h n j] -> [h n j k]; zeros in an empty column."""
        rows = column.take(rearrange(place, "h n j -> h (n j)"))
        return rearrange(rows, "h (n j) k -> h n j k", n=place.shape[1])

    def nearest(self, stream: StreamRecord, cursor: int, query: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The nearest of the searched rows (chunks), best first: scores and places, -1 for none: [h n j]."""
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
        """The nearest rows, by comparing all of them."""
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
        """The nearest of what an index for each head proposes and of the rows it does not cover yet."""
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
        """Inner products of queries and the rows at places, -inf for none: [h n k], [h n j] -> [h n j]."""
        none, pieces = place < 0, list(column.pieces())
        if query.dtype == torch.float32 and len(pieces) == 1:
            rows, lines = rearrange(pieces[0], "r h k -> (r h) k"), lines_of_heads(place)
            return products_at(query, rows, lines.masked_fill(none, -1))
        rows = self.rows_at(column, place.clamp(min=0))
        if query.dtype == torch.float32:  # to the last bit what the same rows give in one piece
            h, n, j = place.shape
            lines = rearrange(torch.arange(place.numel()), "(h n j) -> h n j", h=h, n=n, j=j)
            return products_at(query, rearrange(rows, "h n j k -> (h n j) k"), lines.masked_fill(none, -1))
        return einsum(query, rows, "h n k, h n j k -> h n j").masked_fill_(none, -torch.inf)

    def weights(self, number: int, cursor: int, serial: Tensor, weight: Tensor) -> Tensor:
        """The weight with which each row came back, for `append`; serial, weight: [h n j] -> [r]."""
        stream = self.at(number, cursor)
        place = torch.searchsorted(stream.serial.newest, serial.clamp(min=0).flatten())
        total = torch.zeros(len(stream.serial), dtype=torch.float64)
        there = (weight * (serial >= 0)).flatten().double()
        return total.index_add_(0, place, there) if len(total) else total

    def note_encoder(self, sketch: Tensor) -> None:
        """From here on keys are made by the encoder with this sketch: its keys of fixed inputs, [... k]."""
        sketch = sketch.detach().float().clone()
        if not self.encoders or not torch.equal(self.encoders[-1], sketch):
            self.encoders.append(sketch)


def head_rows(column: Column, head: int, start: int, stop: int) -> np.ndarray:
    """One head's rows as FAISS takes them: [m k] float32, contiguous."""
    return np.ascontiguousarray(column.rows(start, stop)[:, head].float().numpy())
