"""Continued pretraining: documents as token ids, packed into rows that continue from batch to batch.

Each document ends with the tokenizer's eos token. Row r of batch i + 1 begins with the token after the last
one of row r of batch i, so a memory's state is carried over until `starts` says that a row begins anew.

Axes: b batch (rows), t tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memlib.config import DocumentsConfig
from memlib.tasks.base import check_split, generator
from memlib.tasks.corpus import STANDARD_LIBRARY, documents
from memlib.tasks.row_stream import RowStream, check_same
from memlib.tasks.text import TEST_SHARE, batches_of, contiguous_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "task.documents"
TOKENISED_TOGETHER = 256  # documents


def packed(
    config: DocumentsConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int = 0,
    split: str = "train",
    epochs: int | None = None,
) -> PackedDocuments | PackedStream:
    """Batches of packed rows: `PackedStream` with `streaming`, else `PackedDocuments`.

    Both yield {"input_ids", "attention_mask", "labels"}, each [b t] int64, and {"starts"} [b] bool. Labels
    are the ids themselves, not shifted, as transformers expects them: so the first token of a row is never
    predicted. Nothing is padded.

    epochs: passes over the data; None: no end

    Raises ValueError for data that is missing, cannot be read or is too short, for a tokenizer without an eos
    token, and for the test split of a stream.
    """
    check_split(split)
    if not config.streaming:
        return PackedDocuments(config, tokenizer, batch_size, seed, split, epochs)
    if split != "train":
        raise ValueError(
            f"{FIELD}.streaming: a stream has no {split} split; name the data of that split in "
            f"{FIELD}.dataset or {FIELD}.split, or set {FIELD}.streaming: false"
        )
    if config.dataset == STANDARD_LIBRARY:
        raise ValueError(
            f"{FIELD}.streaming: {STANDARD_LIBRARY} is read whole; set it to false, or name files"
        )
    return PackedStream(config, tokenizer, batch_size, seed, epochs)


class PackedDocuments(Iterator[dict[str, Tensor]]):
    """Packed rows of a text that is tokenised whole; a batch is a function of (seed, split, step).

    As in the text task, each row reads its own contiguous part of the text, seed and epoch rotate the text so
    that the parts differ, and the last 10 % of the tokens are the test split.
    """

    def __init__(
        self,
        config: DocumentsConfig,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int = 0,
        split: str = "train",
        epochs: int | None = None,
    ) -> None:
        self.config, self.batch_size, self.seed, self.split = config, batch_size, seed, split
        self.epochs, self.step = epochs, 0
        tokens = tokenised(documents(config, FIELD), tokenizer, config.max_tokens)
        cut = len(tokens) - int(TEST_SHARE * len(tokens))
        self.tokens = tokens[:cut] if split == "train" else tokens[cut:]
        self.batches_per_epoch = batches_of(len(self.tokens), batch_size, config.row_length)
        if self.batches_per_epoch < 1:
            raise ValueError(
                f"{FIELD}.dataset = {config.dataset!r}: {len(self.tokens)} tokens of {split} text are too "
                f"few for {batch_size} rows of {config.row_length} + 1 tokens; lower {FIELD}.row_length "
                "or the batch size, or use more text"
            )

    def __next__(self) -> dict[str, Tensor]:
        epoch, i = divmod(self.step, self.batches_per_epoch)
        if epoch == self.epochs:
            raise StopIteration
        self.step += 1
        offset = int(generator(self.seed, self.split, epoch).integers(len(self.tokens)))
        rows = contiguous_rows(self.tokens, self.batch_size, self.config.row_length, i, offset)
        return as_batch(rows[:, :-1], starts=i == 0)

    def state_dict(self) -> dict[str, Any]:
        """The position, as values that JSON can hold."""
        return {**self._identity(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; raises ValueError if it belongs to other data or settings."""
        check_same(state, self._identity(), FIELD)
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "split": self.split,
            "batch_size": self.batch_size,
            "row_length": self.config.row_length,
            "tokens": len(self.tokens),
        }


class PackedStream(Iterator[dict[str, Tensor]]):
    """Packed rows of a text that is read while it is used.

    A row that has fewer than t tokens left takes the next document of the stream. So rows never end, and
    `starts` is true in the first batch only. What is left when the last epoch ends is dropped.
    """

    def __init__(
        self,
        config: DocumentsConfig,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.rows = RowStream(config, FIELD, seed, epochs)
        self.left: list[list[int]] = [[] for _ in range(batch_size)]
        self.step, self.last_used = 0, -1

    def __next__(self) -> dict[str, Tensor]:
        t = self.config.row_length
        for row in self.left:
            while len(row) < t:
                row += self._next_document()
        rows = np.array([row[:t] for row in self.left])
        self.left = [row[t:] for row in self.left]
        self.step += 1
        return as_batch(rows, starts=self.step == 1)

    def state_dict(self) -> dict[str, Any]:
        """The position, as values that JSON can hold: with the tokens left of each row's document."""
        return {
            "row_length": self.config.row_length,
            "batch_size": len(self.left),
            "step": self.step,
            "last_used": self.last_used,
            "left": [list(row) for row in self.left],
            "rows": self.rows.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; raises ValueError if it belongs to other data or settings."""
        check_same(state, {"row_length": self.config.row_length, "batch_size": len(self.left)}, FIELD)
        self.rows.load_state_dict(state["rows"])
        self.left = [list(row) for row in state["left"]]
        self.step, self.last_used = state["step"], state["last_used"]

    def _next_document(self) -> list[int]:
        """The tokens of the next document that is not empty; raises StopIteration after the last epoch."""
        while (row := next(self.rows, None)) is not None:
            text = row.get(self.config.text_field)
            if self.config.text_field not in row or not isinstance(text, str | None):
                raise ValueError(
                    f"{FIELD}.text_field = {self.config.text_field!r}: no text in {self.config.dataset}, "
                    f"which has the columns {', '.join(row)}; name one that holds text"
                )
            if text:
                self.last_used = self.rows.epoch
                return encode_documents([text], self.tokenizer)[0]
            self._check_used()
        self._check_used()
        raise StopIteration

    def _check_used(self) -> None:
        """Raise ValueError if a complete epoch had no text: the iterator would never end."""
        if self.last_used < self.rows.epoch - 1:
            raise ValueError(f"{FIELD}.dataset = {self.config.dataset!r}: holds no text; choose another")


def tokenised(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> np.ndarray:
    """Concatenate documents as token ids, each followed by eos, up to max_tokens: [t] int32."""
    parts: list[np.ndarray] = []
    left, source = max_tokens, (text for text in texts if text)
    while left > 0 and (together := list(islice(source, TOKENISED_TOGETHER))):
        for ids in encode_documents(together, tokenizer):
            parts.append(np.array(ids[:left], dtype=np.int32))
            left -= len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def encode_documents(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of documents, each followed by eos.

    Special tokens that a document spells out are read as ordinary text, so eos stands only at its end.

    Raises ValueError for a tokenizer without an eos token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, which separates documents; set tokenizer.eos_token")
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]


def as_batch(rows: np.ndarray, starts: bool) -> dict[str, Tensor]:
    """Rows [b t] as a batch without padding."""
    ids = torch.from_numpy(rows.astype(np.int64))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "starts": torch.full((len(ids),), starts),
    }
