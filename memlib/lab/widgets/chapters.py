"""Chapters over time: a router's probabilities or weights, token by token."""

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
    """One strip per chapter, over the tokens of one stream.

    point: "probability", of each chapter before selection; "weight", of the selected chapters, zero for the
    others. word: the name of a token id (a task's `name_of`).
    """
    values = trace[f"{memory}.{point}"].at(layer=layer, batch=row).values
    lines = {f"chapter {c}": values[:, c] for c in range(values.shape[1])}
    return token_strips(trace, lines, f"Chapters over time: {point}", word, row, segment_length)
