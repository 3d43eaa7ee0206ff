"""The hierarchy of states over time: what a token can see of each level, and how much it reads.

Axes: n tokens, l levels, k banks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from einops import rearrange

from memlib.lab.levels import Levels, levels_of
from memlib.lab.pictures import borders
from memlib.lab.trace import Trace
from memlib.lab.widgets.frame import stream_group
from memlib.lab.widgets.text import words_of
from memlib.lab.widgets.view import View

LEVELS = ["0 · the token", "1 · blocks", "2 · summary", "3 · banks"]
SHOW = ["visible to this token", "read by each token", "written by each token"]


def levels_over_time(
    trace: Trace, word: Callable[[int], str] = str, memory: str = "hds", row: int = 0, layer: int = 0
) -> View:
    """The four levels and the banks of one stream, token by token, with the measures of `levels_of`."""
    seen = levels_of(trace, memory, row, layer)
    tokens, banks = words_of(trace, word, row), seen.read.shape[1]
    labels = LEVELS + [f"bank {k}, ½ in {half:.1f}" for k, half in enumerate(seen.half_lives)]
    deepest = int(seen.level[:, -1].argmax())

    def draw(axis: Any, time: int) -> None:
        image = axis.imshow(
            ladder(seen, time), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest"
        )
        borders(axis, len(tokens), seen.segment_length)
        axis.axvline(time, color="white", linewidth=1)
        axis.axhline(len(LEVELS) - 0.5, color="white", linewidth=2)
        axis.set(xlabel=f"token; seen from token {time} “{tokens[time]}”", yticks=range(len(labels)))
        axis.set_yticklabels(labels, fontsize=8)
        axis.figure.colorbar(image, ax=axis, label="levels: weight in its read\nbanks: what remains")

    return View(
        kind="levels",
        title=f"Levels of {memory} memory",
        summary=f"{len(tokens)} tokens, {len(LEVELS)} levels, {banks} banks with half-lives of "
        f"{', '.join(f'{half:.1f}' for half in seen.half_lives)} segments. Token {deepest} "
        f"“{tokens[deepest]}” reads most from the banks, {seen.level[deepest, -1]:.2f} of its read; the mean "
        f"weights of the levels are {', '.join(f'{part:.2f}' for part in seen.level.mean(0))}.",
        arrays={
            "level": seen.level.astype(np.float32),
            "bounds": seen.bounds.astype(np.int32),
            "block": seen.block.astype(np.float32),
            "nothing": seen.nothing.astype(np.float32),
            "read": seen.read.astype(np.float32),
            "written": seen.written.astype(np.float32),
            "filled": seen.filled.astype(np.float32),
            "left": seen.left.astype(np.float32),
            "norm": seen.norm.astype(np.float32),
        },
        draw=draw,
        times=len(tokens),
        time=deepest,
        items=len(labels),
        item=len(LEVELS),
        words={
            "tokens": tokens,
            "rows": labels,
            "levels": len(LEVELS),
            "half_lives": [float(half) for half in seen.half_lives],
            "segment_length": seen.segment_length,
        },
        choices={"show": SHOW},
        group=stream_group(trace, row),
        page=seen.segment_length,
        size=(8, 1.4 + 0.28 * len(labels)),
    )


def ladder(seen: Levels, time: int) -> np.ndarray:
    """What a token sees of each earlier token, one line per level and bank: [l+k n].

    Levels: weight in the token's read; banks: what remains of the write, relative to the maximum.
    """
    past = time // seen.segment_length * seen.segment_length
    lines = np.zeros((seen.level.shape[1] - 1, len(seen.level)))
    lines[0, time] = seen.level[time, 0]
    for (first, last), weight in zip(seen.bounds, seen.block[time], strict=True):
        lines[1, first : last + 1] = seen.level[time, 1] * weight
    lines[2, :past] = seen.level[time, 2]
    left = rearrange(seen.left[time // seen.segment_length], "n k -> k n")
    found = left.max(0, keepdims=True) > 0
    return np.concatenate((lines, seen.level[time, 3] * found, left / max(seen.left.max(), 1e-9)))
