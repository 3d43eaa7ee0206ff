"""Load documents into one array of bytes; offline by default."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from memlib.config import TextConfig
from memlib.tasks.sources import Source, open_dataset

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATOR = 0
STANDARD_LIBRARY = "python-stdlib"


def read_corpus(config: TextConfig) -> np.ndarray:
    """Read the text into [t] uint8: UTF-8 bytes of all documents, each followed by byte 0; t <= max_bytes.

    Raises ValueError if the dataset is missing, cannot be read, lacks the text column or is empty.
    """
    joined = _join(documents(config, "task.text"), config.max_bytes)
    if not joined:
        raise ValueError(f"task.text.dataset = {config.dataset!r}: holds no text; choose another")
    return np.frombuffer(joined, dtype=np.uint8)


def _join(documents: Iterable[str | None], max_bytes: int) -> bytes:
    """Concatenate documents as bytes, each followed by the separator, up to max_bytes."""
    joined = bytearray()
    for document in documents:
        content = (document or "").encode(errors="replace").replace(b"\0", b"")
        if content:
            joined += content + bytes([SEPARATOR])
        if len(joined) >= max_bytes:
            joined[max_bytes - 1 :] = bytes([SEPARATOR])
            break
    return bytes(joined)


class TextSource(Source, Protocol):
    """The options that say which text is read."""

    text_field: str


def documents(config: TextSource, field: str) -> Iterator[str | None]:
    """The texts of a data set, or of "python-stdlib"; field: the configuration's path, for errors.

    Raises ValueError if the dataset is missing, cannot be read or lacks the text column.
    """
    parts = [_standard_library()] if config.dataset == STANDARD_LIBRARY else open_dataset(config, field)
    for part in parts:
        yield from _column(part, config, field)


def _column(dataset: Dataset, config: TextSource, field: str) -> Iterable[str | None]:
    if config.text_field not in dataset.column_names:
        raise ValueError(
            f"{field}.text_field = {config.text_field!r}: {config.dataset} has the columns "
            f"{', '.join(dataset.column_names)}; name one of them"
        )
    kind = getattr(dataset.features[config.text_field], "dtype", "a structure")
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"{field}.text_field = {config.text_field!r}: holds {kind} in {config.dataset}, "
            "not text; name another column"
        )
    return dataset[config.text_field]


def _standard_library() -> Dataset:
    """The interpreter's own top-level modules, sorted by name: real text that needs no download."""
    from datasets import Dataset

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return Dataset.from_dict({"file": [file.name for file in files], "text": texts})
