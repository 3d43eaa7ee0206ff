"""Text into token ids and back, as the task of a configuration has them: bytes, or named words."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from memlib.config import Config
from memlib.tasks import make_task
from memlib.tasks.corpus import SEPARATOR


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; `stop` are the ids after which a text has ended."""

    stop: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; ValueError for what has none."""

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, piece by piece; joined, the whole text."""


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of tokens."""
    return "".join(tokenizer.pieces(tokens))


class ByteTokenizer:
    """UTF-8 bytes; byte 0 ends a document and is no text, as in the text task.

    Bytes that are no UTF-8 come out as �, and so do ids above 255.
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
    """Names between blanks; of tokens with one name (the fillers `.` of recall) the first is meant.

    Ids without a name come out as <id>.
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
            raise ValueError(f"{unknown[0]!r} is no word of this vocabulary: it has {' '.join(self.ids)}")
        return [self.ids[word] for word in words]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        for i, token in enumerate(tokens):
            name = self.names[token] if token < len(self.names) else f"<{token}>"
            yield f" {name}" if i else name


def tokenizer_for(config: Config) -> Tokenizer:
    """The tokenizer of a configuration's task; reads no data."""
    if config.task.name == "text":
        return ByteTokenizer()
    return WordTokenizer(make_task(config.task, config.model.segment_length).vocabulary.names)
