"""Names of a recording's tokens."""

from __future__ import annotations

from collections.abc import Callable

from memlib.lab.trace import Trace


def words_of(trace: Trace, word: Callable[[int], str], row: int = 0) -> list[str]:
    """The names of one recorded stream's tokens; word: name of a token id."""
    return [word(int(token)) for token in trace["tokens"].at(batch=row).values]
