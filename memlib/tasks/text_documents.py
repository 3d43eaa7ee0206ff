"""Real text as bytes, document by document, in lanes or in buckets (`memlib.tasks.lanes`).

Axes: b rows of a batch, s segments of a row, n tokens of a segment, t = s n.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange

from memlib.config import TextConfig
from memlib.tasks.base import Batch, check_split, generator
from memlib.tasks.corpus import SEPARATOR
from memlib.tasks.lanes import assign, buckets
from memlib.tasks.text import TEST_SHARE, Text


class Segments(NamedTuple):
    """Which part of the text each segment is; arrays of one shape.

    first: index of its first token; length: its tokens, 0 for a segment of padding; begins: whether a
    document begins with it.
    """

    first: np.ndarray
    length: np.ndarray
    begins: np.ndarray

    def rows(self, parts: list[np.ndarray], segments: int) -> Segments:
        """One row of `segments` segments for each list of segments, filled up with padding: [b s]."""
        index = np.full((len(parts), segments), -1, dtype=np.int64)
        for row, part in zip(index, parts, strict=True):
            row[: len(part)] = part
        real = index >= 0
        return Segments(self.first[index], self.length[index] * real, self.begins[index] & real)


class TextDocuments(Text):
    """Next-byte prediction, each document by itself: its first byte is predicted from byte 0, its last target
    is byte 0, and memory starts anew with each (`Batch.fresh`).

    With documents = "lanes" a row reads whole documents, one after another, and memory is carried over from
    batch to batch. With "buckets" a row is a document, or a piece of one of at most `segments` segments, and
    the batch's number of rows and of segments depend on the documents' lengths. Each document begins with a
    segment; its last segment is padded. The last documents, about 10 % of the bytes, are the test split.

    Raises ValueError as `Text` does, and for fewer than two documents or fewer than lanes.
    """

    def __init__(
        self,
        config: TextConfig,
        segment_length: int,
        segments: int = 4,
        segments_min: int | None = None,
    ) -> None:
        super().__init__(config, segment_length, segments, segments_min)
        self.continues = config.documents == "lanes"
        longest = None if self.continues else segments
        self.documents = {split: bounds(text) for split, text in self.text.items()}
        self.table = {
            split: table_of(*cut_to(longest, segment_length, *documents), segment_length)
            for split, documents in self.documents.items()
        }
        self.stream = {
            split: np.append(np.uint8(SEPARATOR), text).astype(np.int64) for split, text in self.text.items()
        }
        self.plan = lru_cache(maxsize=2)(self.make_plan)

    def cut(self, corpus: np.ndarray) -> int:
        """The border of documents nearest to 90 % of the bytes."""
        borders = np.flatnonzero(corpus == SEPARATOR)[:-1] + 1
        if not len(borders):
            raise ValueError(
                f"task.text.documents = {self.config.documents!r}: {self.config.dataset} holds one document; "
                "use joined, or a folder or table with several"
            )
        return int(borders[np.abs(borders - (1 - TEST_SHARE) * len(corpus)).argmin()])

    def make_plan(self, batch_size: int, seed: int, epoch: int, split: str) -> list[Segments]:
        """The segments of every batch of an epoch: [b s] each."""
        rng, table = generator(seed, split, epoch), self.table[split]
        ends = np.flatnonzero(np.append(table.begins[1:], True)) + 1
        starts = np.append(0, ends[:-1])
        lengths = ends - starts
        if self.continues:
            lanes = [
                np.concatenate([np.arange(starts[d], ends[d]) for d in documents])
                for documents in assign(lengths, batch_size, rng)
            ]
            batches = -(-max(map(len, lanes)) // self.segments)
            whole = table.rows(lanes, batches * self.segments)
            return [
                Segments(*(part[:, i * self.segments : (i + 1) * self.segments] for part in whole))
                for i in range(batches)
            ]
        found = []
        for rows in buckets(lengths, batch_size, self.segments, rng):
            parts = [np.arange(starts[d], ends[d]) for d in rows]
            parts += [np.arange(0)] * (-len(parts) % batch_size)
            found.append(table.rows(parts, int(lengths[rows].max())))
        return found

    def batches_per_epoch(self, batch_size: int, split: str = "train") -> int:
        check_split(split)
        documents = len(self.documents[split][0])
        if self.continues and documents < batch_size:
            raise ValueError(
                f"{self.config.dataset}: {documents} {split} documents are too few for {batch_size} rows; "
                "lower training.batch_size, or use task.text.documents: joined"
            )
        return len(self.plan(batch_size, 0, 0, split))

    def test_rows(self, at_most: int) -> int:
        """Number of parallel rows that the test split can fill."""
        return min(at_most, len(self.documents["test"][0])) if self.continues else at_most

    def batch(self, batch_size: int, step: int, seed: int = 0, split: str = "train") -> Batch:
        """Batch number `step`; with buckets, its rows are a multiple of batch_size."""
        epoch, i = divmod(step, self.batches_per_epoch(batch_size, split))
        segments = self.plan(batch_size, seed, epoch, split)[i]
        place, text = np.arange(self.segment_length), self.stream[split]
        real = place < rearrange(segments.length, "b s -> b s 1")
        index = (rearrange(segments.first, "b s -> b s 1") + place) * real
        ids, targets, mask = (
            torch.from_numpy(rearrange(part, "b s n -> b (s n)"))
            for part in (text[index], text[index + real], real)
        )
        fresh = torch.from_numpy(segments.begins)
        if not self.continues:  # every row begins with the batch
            return Batch(ids, targets, mask, torch.ones(len(ids), dtype=torch.bool), mask)
        return Batch(ids, targets, mask, fresh[:, 0], mask, fresh)


def bounds(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens of each document, in the text with byte 0 in front: [d] each."""
    ends = np.flatnonzero(text == SEPARATOR) + 1
    first = np.append(0, ends[:-1])
    kept = ends - first > 1
    return first[kept], (ends - first)[kept]


def cut_to(
    longest: int | None, n: int, first: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same documents in pieces of at most `longest` segments of n tokens; None: whole."""
    if longest is None:
        return first, count
    size = longest * n
    pieces = [(f + p, min(size, c - p)) for f, c in zip(first, count, strict=True) for p in range(0, c, size)]
    starts, counts = np.array(pieces, dtype=np.int64).T
    return starts, counts


def table_of(first: np.ndarray, count: np.ndarray, n: int) -> Segments:
    """All segments of all documents, in order: arrays [segments]."""
    pieces = -(-count // n)
    place = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    left = np.repeat(count, pieces) - place * n
    return Segments(np.repeat(first, pieces) + place * n, np.minimum(left, n), place == 0)


def open_text(
    config: TextConfig, segment_length: int, segments: int = 4, segments_min: int | None = None
) -> Text:
    """The text task that `task.text.documents` asks for."""
    kind = Text if config.documents == "joined" else TextDocuments
    return kind(config, segment_length, segments, segments_min)
