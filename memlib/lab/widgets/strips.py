"""Strips: several values in 0 … 1 over the same positions, each as a colour strip and a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from memlib.lab.pictures import borders, colour_of
from memlib.lab.trace import Trace
from memlib.lab.widgets.frame import stream_group
from memlib.lab.widgets.text import words_of
from memlib.lab.widgets.view import View

SHUT, OPEN = 0.05, 0.95
LINES = 4  # a static picture shows more lines than this as strips, because lines would overlap


def strips(
    lines: Mapping[str, np.ndarray],
    words: Sequence[str],
    title: str,
    unit: str = "step",
    segment_length: int = 0,
    group: str = "",
    gates: bool = False,
) -> View:
    """A view of strips; lines: by name, each [n]; words: label of each position; unit: name of a position.

    gates: report where a line is shut (below 0.05) or open (above 0.95). Raises ValueError if a value is
    outside 0 … 1 or the lengths differ.
    """
    values = np.stack([np.asarray(line, dtype=np.float32) for line in lines.values()])
    if values.shape[1] != len(words):
        raise ValueError(f"{title}: lines of {values.shape[1]} values and {len(words)} words")
    if values.min() < -1e-4 or values.max() > 1 + 1e-4:
        raise ValueError(f"{title}: values from {values.min():g} to {values.max():g}; strips show 0 to 1")

    def draw(axis: Any, time: int) -> None:
        (draw_lines if len(lines) <= LINES else draw_strips)(axis, list(lines), values)
        borders(axis, len(words), segment_length)
        if time:
            axis.axvline(time, color="black" if len(lines) <= LINES else "white", linewidth=1)
        axis.set(xlabel=unit)
        if len(words) <= 24:
            axis.set_xticks(range(len(words)), words, fontsize=8)

    said = "; ".join(describe(label, line, gates) for label, line in zip(lines, values, strict=True))
    return View(
        kind="strips",
        title=title,
        summary=f"{title}: {len(words)} {unit}s. {said}.",
        arrays={"lines": values},
        draw=draw,
        times=len(words),
        items=len(lines),
        unit=unit,
        words={
            "rows": list(lines),
            "places": list(words),
            "segment_length": segment_length,
            "gates": [SHUT, OPEN] if gates else None,
        },
        group=group,
        page=segment_length or 10,
    )


def token_strips(
    trace: Trace,
    lines: Mapping[str, np.ndarray],
    title: str,
    word: Callable[[int], str],
    row: int,
    segment_length: int,
    gates: bool = False,
) -> View:
    """A view of strips over the tokens of one recorded stream; lines: by name, each [n]."""
    return strips(
        lines,
        words_of(trace, word, row),
        title,
        unit="token",
        segment_length=segment_length,
        group=stream_group(trace, row),
        gates=gates,
    )


def draw_lines(axis: Any, labels: Sequence[str], values: np.ndarray) -> None:
    for i, (label, line) in enumerate(zip(labels, values, strict=True)):
        axis.plot(line, label=label, color=colour_of(label, i), drawstyle="steps-mid", linewidth=1.6)
    axis.set(ylim=(-0.05, 1.05))
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels), frameon=False)


def draw_strips(axis: Any, labels: Sequence[str], values: np.ndarray) -> None:
    image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.figure.colorbar(image, ax=axis)


def describe(label: str, line: np.ndarray, gates: bool) -> str:
    text = f"{label} from {line.min():.2f} to {line.max():.2f}"
    if gates:
        text += f", open at {percent(line > OPEN)}, shut at {percent(line < SHUT)}"
    return text


def percent(holds: np.ndarray) -> str:
    """The fraction of true values in whole per cent, rounded half up like the front end."""
    return f"{int(100 * holds.mean() + 0.5)} %"
