"""Chapters over time: which chapters a router wants, token by token."""

from __future__ import annotations

from collections.abc import Callable

from memlib.lab.trace import Trace
from memlib.lab.widgets.strips import token_strips
from memlib.lab.widgets.view import View


def chapters_over_time(
    trace: Trace,
    word: Callable[[int], str] = str,
    memory: str = "chapters",
    point: str = "probability",
    row: int = 0,
    layer: int = 0,
    segment_length: int = 0,
) -> View:
    """One strip a chapter, over the tokens of one stream.

    point: "probability", what the router gives each chapter before it chooses; "weight", what the chosen
    ones count, zero for the others. word: a token id as a person reads it (a task's `name_of`).
    """
    values = trace[f"{memory}.{point}"].at(layer=layer, batch=row).values
    lines = {f"chapter {c}": values[:, c] for c in range(values.shape[1])}
    return token_strips(trace, lines, f"Chapters over time: {point}", word, row, segment_length)
