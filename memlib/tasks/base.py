"""Base classes of tasks: batches as a function of (seed, split, step), a chance level, an oracle.

Axes: b batch, t tokens of an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlib.tasks.vocabulary import Vocabulary

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with next-token targets.

    tokens:  [b t] int64
    targets: [b t] int64, the token after each position
    scored:  [b t] bool, positions that count for loss and accuracy
    starts:  [b] bool, rows that begin a new document; their memory must be reset first
    mask:    [b t] bool, false for padding; None if there is none
    fresh:   [b s] bool, segments with which a row begins a new document; None if only `starts` says so
    """

    tokens: Tensor
    targets: Tensor
    scored: Tensor
    starts: Tensor
    mask: Tensor | None = None
    fresh: Tensor | None = None

    @classmethod
    def of(cls, stream: np.ndarray, scored: np.ndarray, starts: np.ndarray) -> Batch:
        """Build from stream [b t+1] (its last token is a target only), scored [b t] and starts [b]."""
        ids = torch.from_numpy(stream.astype(np.int64, copy=False))
        return cls(
            ids[:, :-1].contiguous(),
            ids[:, 1:].contiguous(),
            torch.from_numpy(scored),
            torch.from_numpy(starts),
        )

    @property
    def real_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return self.tokens.numel() if self.mask is None else int(self.mask.sum())

    def rows(self, which: slice) -> Batch:
        """Some of the rows."""
        return self._each(lambda part: part[which])

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on a device."""
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        parts: dict[str, Any] = {
            name: None if part is None else change(part) for name, part in vars(self).items()
        }
        return Batch(**parts)

    def borders(self, part: slice, segment_length: int) -> dict[str, Tensor]:
        """What a model is told of some of the tokens, whole segments, besides their ids."""
        found = {}
        if self.mask is not None:
            found["attention_mask"] = self.mask[:, part]
        if self.fresh is not None:
            found["fresh"] = self.fresh[:, part.start // segment_length : -(-part.stop // segment_length)]
        return found


class Task(ABC):
    """Batches of t = segments * segment_length tokens, with scored positions and an oracle.

    vocabulary: names of the tokens
    chance:     accuracy at the scored positions of the best guess without memory; each task documents
                its value
    continues:  False: every batch holds complete examples; True: row r of batch i + 1 continues row r of
                batch i, so memory must be carried over
    """

    vocabulary: Vocabulary
    chance: float
    continues = False

    def __init__(self, segment_length: int, segments: int) -> None:
        self.segment_length, self.segments = segment_length, segments

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 … vocab_size - 1."""
        return len(self.vocabulary)

    def name_of(self, token: int) -> str:
        """The readable name of a token."""
        return self.vocabulary.names[token]

    @abstractmethod
    def batch(self, batch_size: int, step: int, seed: int = 0, split: str = "train") -> Batch:
        """Batch number `step`; equal arguments always give the same batch.

        Raises ValueError if split is neither train nor test.
        """

    def test_rows(self, at_most: int) -> int:
        """Number of parallel rows that the test split can fill, up to `at_most`."""
        return at_most

    def oracle(self, tokens: Tensor) -> Tensor:
        """Correct predictions [b t] for tokens [b t], each from the tokens up to its position.

        A slow Python loop, used as the upper bound in tests and notebooks. Only scored positions are
        predicted; the others may be 0.
        """
        return torch.tensor([self.solve(row) for row in tokens.tolist()], dtype=torch.int64)

    @abstractmethod
    def solve(self, row: list[int]) -> list[int]:
        """The oracle's predictions for one row."""


class GeneratedTask(Task):
    """A task with unlimited random examples; every batch holds complete examples.

    Training batches draw their number of segments uniformly from segments_min … segments; test
    batches always have `segments`.

    Raises ValueError if segments_min is above segments, or if an example could have fewer than `least`
    segments.
    """

    def __init__(self, segment_length: int, segments: int, segments_min: int | None, least: int = 2) -> None:
        super().__init__(segment_length, segments)
        self.segments_min = segments if segments_min is None else segments_min
        if self.segments_min > segments:
            raise ValueError(
                f"segments_min = {segments_min}: at most segments = {segments}; lower segments_min"
            )
        if self.segments_min < least:
            name = "segments" if segments_min is None else "segments_min"
            raise ValueError(
                f"{name} = {self.segments_min}: these options need at least {least}, because everything "
                f"asked for must be shown before the last segment; raise {name}"
            )

    def batch(self, batch_size: int, step: int, seed: int = 0, split: str = "train") -> Batch:
        rng = generator(seed, split, step)
        segments = self.segments
        if split == "train":
            segments = int(rng.integers(self.segments_min, self.segments + 1))
        stream, scored = self.generate(rng, batch_size, segments)
        return Batch.of(stream, scored, np.ones(batch_size, dtype=bool))

    @abstractmethod
    def generate(
        self, rng: np.random.Generator, batch_size: int, segments: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generate one batch of examples: stream [b t+1] and scored [b t]."""


def check_split(split: str) -> None:
    """Raise ValueError unless split is train or test."""
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: expected one of {', '.join(SPLITS)}")


def generator(seed: int, split: str, number: int) -> np.random.Generator:
    """An independent random generator for each (seed, split, number)."""
    check_split(split)
    return np.random.default_rng([seed, SPLITS.index(split), number])
