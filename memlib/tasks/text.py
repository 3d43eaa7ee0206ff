"""Real text, byte by byte, as parallel streams whose rows go on from batch to batch."""

from __future__ import annotations

import numpy as np
from einops import rearrange

from memlib.config import TextConfig
from memlib.tasks.base import Batch, Task, check_split, generator
from memlib.tasks.corpus import SEPARATOR, read_corpus
from memlib.tasks.vocabulary import Vocabulary

TEST_SHARE = 0.1
LONGEST_MATCH = 8


class Text(Task):
    """Next-byte prediction on documents that each end with byte 0; every position is scored.

    Row r of b reads a contiguous stretch of its own, 1/b of the text: batch i + 1 goes on where
    batch i ended, so memory is carried over (`continues`) until `starts` says that the row begins
    anew. Seed and epoch turn the text like a ring, so that the stretches differ; the seam is the
    end of a document. The last 10 % of the bytes are the test split.

    chance: accuracy on the test split of always saying the training split's commonest byte.

    Stretches are cut by batch_size, segments and segment_length: where one of them changes in
    mid-run, all memory must be reset, as the rows then stand elsewhere.

    Raises ValueError for a text that cannot be read or is too short, and for segments_min, which
    would break the rows' continuity.
    """

    continues = True

    def __init__(
        self,
        config: TextConfig,
        segment_length: int,
        segments: int = 4,
        segments_min: int | None = None,
    ) -> None:
        if segments_min is not None:
            raise ValueError(
                f"segments_min = {segments_min}: text rows go on from batch to batch and need one "
                "length; set segments_min to null"
            )
        super().__init__(segment_length, segments)
        self.config = config
        self.vocabulary = Vocabulary({"byte": [byte_name(byte) for byte in range(256)]})
        corpus = read_corpus(config)
        cut = len(corpus) - int(TEST_SHARE * len(corpus))
        self.text = {"train": np.append(corpus[:cut], np.uint8(SEPARATOR)), "test": corpus[cut:]}
        commonest = np.bincount(self.text["train"]).argmax()
        self.chance = float((self.text["test"] == commonest).mean())

    def batches_per_epoch(self, batch_size: int, split: str = "train") -> int:
        """Batches until each row has read its stretch; ValueError if the stretch is too short."""
        check_split(split)
        total, t = len(self.text[split]), self.segments * self.segment_length
        batches = (total // batch_size - 1) // t
        if batches < 1:
            raise ValueError(
                f"{self.config.dataset}: {total} bytes of {split} text are too few for "
                f"{batch_size} rows of {t} + 1 bytes; lower one of them or give more text"
            )
        return batches

    def test_rows(self, at_most: int) -> int:
        """How many parallel rows the test split can fill; ValueError if not even one."""
        rows = min(at_most, len(self.text["test"]) // (self.segments * self.segment_length + 1))
        self.batches_per_epoch(max(rows, 1), "test")
        return rows

    def batch(self, batch_size: int, step: int, seed: int = 0, split: str = "train") -> Batch:
        """Batch number `step`: the next segments * segment_length bytes of each row."""
        epoch, i = divmod(step, self.batches_per_epoch(batch_size, split))
        text, t = self.text[split], self.segments * self.segment_length
        turned = generator(seed, split, epoch).integers(len(text))
        first = turned + np.arange(batch_size) * (len(text) // batch_size) + i * t
        stream = text[(rearrange(first, "b -> b 1") + np.arange(t + 1)) % len(text)]
        scored = np.ones((batch_size, t), dtype=bool)
        return Batch.of(stream, scored, np.full(batch_size, i == 0))

    def solve(self, row: list[int]) -> list[int]:
        """What followed the latest earlier place that ends in the same 8, 7, … or 1 bytes.

        Text has no oracle: this copying reader is a reference, not an upper bound.
        """
        followed: dict[tuple[int, ...], int] = {}
        predictions = []
        for i, token in enumerate(row):
            for length in range(1, min(LONGEST_MATCH, i) + 1):
                followed[tuple(row[i - length : i])] = token
            endings = (
                tuple(row[i + 1 - length : i + 1]) for length in range(min(LONGEST_MATCH, i + 1), 0, -1)
            )
            predictions.append(next((followed[e] for e in endings if e in followed), 0))
        return predictions


def byte_name(byte: int) -> str:
    """A byte as a person reads it: ¶ for the end of a document, else ASCII, escaped if needed."""
    return "¶" if byte == SEPARATOR else chr(byte).encode("unicode_escape").decode()
