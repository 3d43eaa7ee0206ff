"""Retrieval hits: the past tokens that a token retrieves, by head, with score and weight.

Axes: l layers, h heads, n tokens, j hits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from einops import reduce

from memlib.lab.measures import best_hits
from memlib.lab.trace import Trace
from memlib.lab.widgets.frame import stream_group
from memlib.lab.widgets.text import words_of
from memlib.lab.widgets.view import View


def hits_view(
    trace: Trace,
    word: Callable[[int], str] = str,
    memory: str = "external",
    row: int = 0,
    segment_length: int = 0,
    marked: Sequence[int] = (),
    most: int = 6,
) -> View:
    """Hits of one token at a time: a column for each head, best hit first.

    Each hit shows its token with the token before it (from which its key is made), its position, score and
    weight in the head's softmax. marked: positions of queries; most: maximum hits per head.
    """
    tokens = words_of(trace, word, row)
    arrays = best_hits(trace, memory, row, most)
    layers = trace.layers[f"{memory}.source"]
    if f"{memory}.search" in trace:
        arrays["gate"] = trace[f"{memory}.retrieval"].at(batch=row).values.astype(np.float32)
        arrays["search"] = trace[f"{memory}.search"].at(batch=row).values.astype(np.int32)
    _, heads, _, hits = arrays["source"].shape
    pictured = min(hits, 3)
    strongest = reduce(arrays["weight"], "l h n j -> n", "max")
    start = int(marked[0]) if len(marked) else int(strongest.argmax())

    def label(layer: int, head: int, t: int, rank: int) -> str:
        u = int(arrays["source"][layer, head, t, rank])
        return f"{place_of(u, segment_length)} “{tokens[u]}”" if u >= 0 else "nothing"

    def draw(axis: Any, time: int) -> None:
        weight, score = (arrays[name][0, :, time, :pictured].T for name in ("weight", "score"))
        axis.imshow(weight, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        for rank in range(pictured):
            for head in range(heads):
                if arrays["source"][0, head, time, rank] < 0:
                    continue
                ink = "black" if weight[rank, head] > 0.55 else "white"
                numbers = f"score {score[rank, head]:.1f}, weight {weight[rank, head]:.2f}"
                text = f"{label(0, head, time, rank)}\n{numbers}"
                axis.text(head, rank, text, ha="center", va="center", size=8, color=ink)
        axis.set(
            xticks=range(heads), yticks=range(pictured), yticklabels=range(1, pictured + 1), ylabel="hit"
        )
        axis.set_xticklabels([f"head {head}" for head in range(heads)])
        axis.set_title(f"token {time} “{tokens[time]}”, layer {layers[0]}", size=9)

    summary = f"Hits of {memory} memory for {len(tokens)} tokens, in {heads} heads."
    for t in list(marked)[:4] or [start]:
        layer, head = divmod(int(arrays["weight"][:, :, t, 0].argmax()), heads)
        if arrays["source"][layer, head, t, 0] >= 0:
            summary += (
                f" Token {t} “{tokens[t]}”: {label(layer, head, t, 0)}"
                f" (layer {layers[layer]}, head {head}, weight {arrays['weight'][layer, head, t, 0]:.2f})."
            )
    return View(
        kind="hits",
        title=f"Hits of {memory} memory",
        summary=summary,
        arrays=arrays,
        draw=draw,
        times=len(tokens),
        items=heads * hits,
        time=start,
        words={
            "tokens": tokens,
            "layers": layers,
            "segment_length": segment_length,
            "marked": [int(t) for t in marked],
        },
        choices={"layer": [f"layer {layer}" for layer in layers]} if len(layers) > 1 else {},
        group=stream_group(trace, row),
        page=segment_length or 10,
        size=(8, 0.8 + 0.42 * pictured),
    )


def place_of(token: int, segment_length: int) -> str:
    """Position of a token as segment:offset, or as its index without segments."""
    return f"{token // segment_length}:{token % segment_length}" if segment_length else str(token)
