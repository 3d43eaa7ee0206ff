"""Gates over time: when a memory is written, and what it forgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memlib.lab.measures import per_token
from memlib.lab.pictures import borders, colour_of
from memlib.lab.trace import Trace
from memlib.lab.widgets.text import words_of
from memlib.lab.widgets.view import View, stream_group


def gates_over_time(
    trace: Trace,
    names: Sequence[str] = ("internal.writer.input", "internal.writer.forget"),
    word: Callable[[int], str] = str,
    row: int = 0,
    segment_length: int = 0,
) -> View:
    """One line a gate and layer, over the tokens of one stream.

    names: recorded points in 0 … 1; word: a token id as a person reads it (a task's `name_of`).
    Below 0.05 a gate counts as shut, above 0.95 as open.
    """
    labels, lines = [], []
    for name in names:
        for layer in range(len(trace.layers[name]) if name in trace else 1):
            label = name.rsplit(".", 1)[-1]
            several = len(trace.layers.get(name, [])) > 1
            labels.append(f"{label}, layer {trace.layers[name][layer]}" if several else label)
            lines.append(per_token(trace, name, row, layer))
    gate = np.stack(lines).astype(np.float32)
    tokens = words_of(trace, word, row)

    def draw(axis: Any, time: int) -> None:
        for label, values in zip(labels, gate, strict=True):
            axis.plot(values, label=label, color=colour_of(label), drawstyle="steps-mid", linewidth=1.6)
        borders(axis, len(tokens), segment_length)
        if time:
            axis.axvline(time, color="black", linewidth=1)
        axis.set(xlabel="token", ylabel="gate", ylim=(-0.05, 1.05))
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels), frameon=False)

    said = "; ".join(
        f"{label} from {v.min():.2f} to {v.max():.2f}, open at {percent(v > 0.95)} of the tokens, "
        f"shut at {percent(v < 0.05)}"
        for label, v in zip(labels, gate, strict=True)
    )
    return View(
        kind="gates",
        title="Gates over time",
        summary=f"Gate values over {len(tokens)} tokens: {said}.",
        arrays={"gate": gate},
        draw=draw,
        times=len(tokens),
        items=len(labels),
        words={"rows": labels, "tokens": tokens, "segment_length": segment_length},
        group=stream_group(trace, row),
        page=segment_length or 10,
    )


def percent(holds: np.ndarray) -> str:
    """How often something holds, in whole per cent, halves up as the front end rounds."""
    return f"{int(100 * holds.mean() + 0.5)} %"
