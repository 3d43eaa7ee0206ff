"""The slot inspector: the writers and readers of a slot, and the model's answers without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from memlib.lab.ablation import Ablation
from memlib.lab.measures import read_weight, write_strength
from memlib.lab.trace import Trace
from memlib.lab.widgets.frame import stream_group
from memlib.lab.widgets.text import words_of
from memlib.lab.widgets.view import View


def busiest_slots(
    trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0, most: int = 48
) -> list[int]:
    """The slots that were both written and read, strongest first."""
    both = write_strength(trace, memory, row, layer).max(0) * read_weight(trace, memory, row, layer).max(0)
    return [int(s) for s in np.argsort(-both, kind="stable")[:most]]


def main_writer(trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0) -> np.ndarray:
    """The token that wrote each slot most strongly: [s]."""
    return write_strength(trace, memory, row, layer).argmax(0)


def inspect_slots(
    trace: Trace,
    ablation: Ablation,
    vocabulary: int,
    word: Callable[[int], str] = str,
    memory: str = "internal",
    row: int = 0,
    layer: int = 0,
    segment_length: int = 0,
) -> View:
    """One slot at a time, among the slots of an ablation (see `memlib.lab.ablation.ablate`).

    vocabulary: number of tokens of the task; further ids of the model are omitted.
    """
    slots = ablation.slots
    written = write_strength(trace, memory, row, layer)[:, slots].T
    read = read_weight(trace, memory, row, layer)[:, slots].T
    tokens = words_of(trace, word, row)
    asked = [f"after token {q.token} “{tokens[q.token]}”" for q in ablation.questions]
    right = np.array([q.answer for q in ablation.questions], dtype=int)
    each = np.arange(len(right))
    lost = ablation.before[each, right] - ablation.together[:, each, right]
    worst = int(lost.max(1).argmax()) if len(right) else 0

    def draw(axis: Any, _time: int) -> None:
        image = axis.imshow(
            lost.T, aspect="auto", cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest", origin="upper"
        )
        axis.set(
            xlabel="slot, most used first", yticks=each, yticklabels=[q.token for q in ablation.questions]
        )
        axis.set_ylabel("question at token")
        axis.figure.colorbar(image, ax=axis, label="probability lost")

    writers = main_writer(trace, memory, row, layer)[slots]
    summary = f"{len(slots)} slots of {memory} memory over {len(tokens)} tokens."
    if len(right):
        writer = writers[worst]
        summary += (
            f" Ablating every slot mainly written by token {writer} “{tokens[writer]}” costs the right "
            f"answer up to {lost.max():.2f} of probability; a single slot costs at most "
            f"{(ablation.before[each, right] - ablation.alone[:, each, right]).max():.2f}."
        )
    return View(
        kind="inspector",
        title="Slot inspector",
        summary=summary,
        arrays={
            "written": written.astype(np.float32),
            "read": read.astype(np.float32),
            "drift": drift(trace, memory, row, layer)[slots].astype(np.float32),
            "before": ablation.before[..., :vocabulary],
            "alone": ablation.alone[..., :vocabulary],
            "together": ablation.together[..., :vocabulary],
        },
        draw=draw,
        times=len(tokens),
        items=len(slots),
        item=worst,
        time=int(writers[worst]),
        words={
            "tokens": tokens,
            "slots": slots,
            "names": [word(v) for v in range(vocabulary)],
            "questions": [{"token": q.token, "answer": q.answer} for q in ablation.questions],
            "segment_length": segment_length,
        },
        choices={"question": asked, "without": ["all slots of its writer", "this slot"]} if asked else {},
        group=stream_group(trace, row),
        page=segment_length or 10,
        size=(8, 2.4),
    )


def drift(trace: Trace, memory: str, row: int, layer: int) -> np.ndarray:
    """Cosine of each slot's content before and after each write: [s t]; 1 = unchanged direction."""
    before = trace[f"{memory}.before"].at(layer=layer, batch=row).values
    after = trace[f"{memory}.after"].at(layer=layer, batch=row).values
    product = (before * after).sum(-1)
    size = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    return (product / np.maximum(size, 1e-9)).T
