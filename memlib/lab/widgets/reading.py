"""Reading over text: how much each token reads from memory, and which earlier tokens it reads.

Axes: n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memlib.lab.measures import provenance, retrieved
from memlib.lab.trace import Trace
from memlib.lab.widgets.frame import stream_group
from memlib.lab.widgets.text import words_of
from memlib.lab.widgets.view import View


def reading_over_text(
    trace: Trace,
    word: Callable[[int], str] = str,
    memory: str = "internal",
    row: int = 0,
    layer: int = 0,
    segment_length: int = 0,
    marked: Sequence[int] = (),
) -> View:
    """The text of one stream, coloured by how strongly each token reads what an earlier token wrote.

    The colour is the largest share of one earlier token in the token's read: through slots (`provenance`), or
    by retrieval (`retrieved`). marked: positions of queries.
    """
    measure = retrieved if f"{memory}.source" in trace else provenance
    origin = measure(trace, memory, row, layer)
    return reading(
        words_of(trace, word, row),
        origin.max(1),
        origin,
        "read from one earlier token",
        segment_length,
        marked,
        title=f"Reading {memory} memory over the text",
        group=stream_group(trace, row),
    )


def reading(
    tokens: Sequence[str],
    amount: np.ndarray,
    origin: np.ndarray,
    amount_label: str = "amount",
    segment_length: int = 0,
    marked: Sequence[int] = (),
    title: str = "Reading over the text",
    group: str = "",
    hits: int = 6,
) -> View:
    """A text with a colour per token, amount [n], and arcs to the largest weights of origin [n n].

    It opens at the first marked token, or at the token with the largest amount.
    """
    source = np.argsort(-origin, axis=1, kind="stable")[:, :hits].astype(np.int32)
    weight = np.take_along_axis(origin, source, 1).astype(np.float32)
    source[weight <= 0] = -1
    length = segment_length or 16

    def draw(axis: Any, _time: int) -> None:
        lines = -(-len(tokens) // length)
        shade = np.full(lines * length, np.nan)
        shade[: len(tokens)] = amount
        image = axis.imshow(shade.reshape(lines, length), aspect="auto", cmap="cividis", vmin=0)
        peak = float(np.nanmax(shade)) or 1.0
        for t, token in enumerate(tokens if len(tokens) <= 256 else []):
            ink = "black" if amount[t] / peak > 0.55 else "white"
            weight = "bold" if t in marked else "normal"
            axis.text(
                t % length, t // length, token, ha="center", va="center", size=8, color=ink, weight=weight
            )
        axis.set(ylabel="segment", xticks=[], yticks=range(lines))
        axis.figure.colorbar(image, ax=axis, label=amount_label)

    strongest = int(np.argmax(amount))
    summary = (
        f"{len(tokens)} tokens; {amount_label} from {amount.min():.2f} to {amount.max():.2f}, most at token "
        f"{strongest} “{tokens[strongest]}”."
    )
    for t in list(marked)[:4] or [strongest]:
        best = int(source[t, 0])
        if best >= 0:
            summary += (
                f" Token {t} “{tokens[t]}” reads most from {best} “{tokens[best]}” ({weight[t, 0]:.2f})."
            )
    return View(
        kind="reading",
        title=title,
        summary=summary,
        arrays={"amount": amount.astype(np.float32), "source": source, "weight": weight},
        draw=draw,
        times=len(tokens),
        time=int(marked[0]) if len(marked) else strongest,
        words={
            "tokens": list(tokens),
            "segment_length": segment_length,
            "marked": [int(t) for t in marked],
            "amount_label": amount_label,
        },
        group=group,
        page=length,
        size=(8, min(6.0, 1 + 0.35 * -(-len(tokens) // length))),
    )
