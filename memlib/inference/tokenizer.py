"""Tokenizers of the tasks: bytes, or names separated by spaces."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from memlib.config import Config
from memlib.tasks import make_task
from memlib.tasks.corpus import SEPARATOR


class Tokenizer(Protocol):
    """Interface that generation needs; stop: ids that end a text."""

    stop: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Convert text to ids; raises ValueError for text that cannot be encoded."""

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Convert tokens to text incrementally; the joined pieces are the whole text."""


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """Convert tokens to text."""
    return "".join(tokenizer.pieces(tokens))


class ByteTokenizer:
    """UTF-8 bytes; byte 0 ends a document, as in the text task.

    Invalid UTF-8 and ids above 255 are decoded as �.
    """

    stop: tuple[int, ...] = (SEPARATOR,)

    def encode(self, text: str) -> list[int]:
        ids = list(text.encode())
        if SEPARATOR in ids:
            raise ValueError("the text holds a zero byte, which ends a document: leave it out")
        return ids

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if token != SEPARATOR:
                yield decoder.decode(bytes([token]) if token < 256 else b"\xff")
        yield decoder.decode(b"", final=True)


class WordTokenizer:
    """Token names separated by spaces; if several tokens share a name (the fillers `.`), the first is used.

    Ids without a name are decoded as <id>.
    """

    stop: tuple[int, ...] = ()

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.ids: dict[str, int] = {}
        for i, name in enumerate(self.names):
            self.ids.setdefault(name, i)

    def encode(self, text: str) -> list[int]:
        words = text.split()
        if unknown := [word for word in words if word not in self.ids]:
            raise ValueError(f"{unknown[0]!r} is not in this vocabulary: it has {' '.join(self.ids)}")
        return [self.ids[word] for word in words]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        for i, token in enumerate(tokens):
            name = self.names[token] if token < len(self.names) else f"<{token}>"
            yield f" {name}" if i else name


def tokenizer_for(config: Config) -> Tokenizer:
    """The tokenizer of a configuration's task; does not load data."""
    if config.task.name == "text":
        return ByteTokenizer()
    return WordTokenizer(make_task(config.task, config.model.segment_length).vocabulary.names)
