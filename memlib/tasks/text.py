"""Real text as bytes, in parallel streams: each row continues from batch to batch.

Axes: b batch (streams), t tokens of a batch.
"""

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

    Each of the b rows reads its own contiguous part, 1/b of the text. Batch i + 1 continues where batch i
    ended, so memory is carried over (`continues`) until `starts` marks the beginning of a new pass. Seed
    and epoch rotate the text, so that the parts differ. The last 10 % of the bytes are the test split.

    chance: accuracy on the test split of always predicting the training split's most frequent byte.

    The parts depend on batch_size, segments and segment_length. If one of these changes during a run, all
    memory must be reset, because rows then continue elsewhere in the text.

    Raises ValueError for a text that cannot be read or is too short, and if segments_min is set: rows of
    varying length would not be contiguous.
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
                f"segments_min = {segments_min}: text rows continue from batch to batch and need one "
                "length; set segments_min to null"
            )
        super().__init__(segment_length, segments)
        self.config = config
        self.vocabulary = Vocabulary({"byte": [byte_name(byte) for byte in range(256)]})
        corpus = read_corpus(config)
        cut = self.cut(corpus)
        self.text = {"train": np.append(corpus[:cut], np.uint8(SEPARATOR)), "test": corpus[cut:]}
        commonest = np.bincount(self.text["train"]).argmax()
        self.chance = float((self.text["test"] == commonest).mean())

    def cut(self, corpus: np.ndarray) -> int:
        """Where the test split begins."""
        return len(corpus) - int(TEST_SHARE * len(corpus))

    def batches_per_epoch(self, batch_size: int, split: str = "train") -> int:
        """Batches in one pass over the text; raises ValueError if the text is too short for one batch."""
        check_split(split)
        total, t = len(self.text[split]), self.segments * self.segment_length
        batches = batches_of(total, batch_size, t)
        if batches < 1:
            raise ValueError(
                f"{self.config.dataset}: {total} bytes of {split} text are too few for "
                f"{batch_size} rows of {t} + 1 bytes; lower task.segments, model.segment_length or "
                "training.batch_size, or use more text"
            )
        return batches

    def test_rows(self, at_most: int) -> int:
        """Number of parallel rows that the test split can fill; raises ValueError if it cannot fill one."""
        rows = min(at_most, len(self.text["test"]) // (self.segments * self.segment_length + 1))
        self.batches_per_epoch(max(rows, 1), "test")
        return rows

    def batch(self, batch_size: int, step: int, seed: int = 0, split: str = "train") -> Batch:
        """Batch number `step`: the next segments * segment_length bytes of each row."""
        epoch, i = divmod(step, self.batches_per_epoch(batch_size, split))
        text, t = self.text[split], self.segments * self.segment_length
        offset = int(generator(seed, split, epoch).integers(len(text)))
        stream = contiguous_rows(text, batch_size, t, i, offset)
        scored = np.ones((batch_size, t), dtype=bool)
        return Batch.of(stream, scored, np.full(batch_size, i == 0))

    def solve(self, row: list[int]) -> list[int]:
        """Copy the byte that followed the most recent match of the last 8, 7, … or 1 bytes.

        Text has no oracle: this predictor is a reference, not an upper bound.
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


def batches_of(total: int, batch_size: int, t: int) -> int:
    """Batches of t tokens per row in one pass over `total` tokens, each row reading its own part."""
    return (total // batch_size - 1) // t


def contiguous_rows(text: np.ndarray, batch_size: int, t: int, i: int, offset: int) -> np.ndarray:
    """Batch i of a pass over `text` rotated by `offset`: [b t+1], the last token only a target.

    Row r reads part r of the b equal parts, so row r of batch i + 1 continues row r of batch i.
    """
    first = offset + np.arange(batch_size) * (len(text) // batch_size) + i * t
    return text[(rearrange(first, "b -> b 1") + np.arange(t + 1)) % len(text)]


def byte_name(byte: int) -> str:
    """The readable name of a byte: ¶ for the end of a document, else ASCII, escaped if needed."""
    return "¶" if byte == SEPARATOR else chr(byte).encode("unicode_escape").decode()
