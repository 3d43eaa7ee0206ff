"""Memory slots over time: writes, reads and changes of each slot, and unused slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from memlib.lab.measures import slot_life
from memlib.lab.trace import Trace
from memlib.lab.widgets.frame import stream_group
from memlib.lab.widgets.view import View

DEAD = 0.05  # a slot is unused if its weight never exceeds this in any segment


def slots_over_time(
    trace: Trace,
    memory: str = "internal",
    row: int = 0,
    layer: int = 0,
    segment_length: int = 0,
    banks: int = 1,
) -> View:
    """Every slot of one memory, segment by segment, with the measures of `slot_life`."""
    life = {name: values.astype(np.float32) for name, values in slot_life(trace, memory, row, layer).items()}
    steps, slots = life["written"].shape
    used = np.maximum(life["written"], life["read"]).max(0) > DEAD
    group = stream_group(trace, row)
    return slot_view(life, banks, segment_length, group, (~used).sum(), f"Slots of {memory} memory")


def slot_view(
    life: dict[str, np.ndarray],
    banks: int = 1,
    segment_length: int = 0,
    group: str = "",
    dead: int | None = None,
    title: str = "Slots over time",
) -> View:
    """A view of slots from given measures; life: by name, each float32 [t s], the first is the default."""
    first = next(iter(life))
    steps, slots = life[first].shape

    def draw(axis: Any, time: int) -> None:
        busy = np.flatnonzero(life[first].max(0) > 0.1)
        busy = busy[np.argsort(life[first][:, busy].argmax(0), kind="stable")]
        image = axis.imshow(
            life[first][:, busy].T if len(busy) else np.zeros((1, steps)),
            aspect="auto",
            cmap="cividis",
            vmin=0,
            interpolation="nearest",
        )
        axis.axvline(time, color="white", linewidth=1, linestyle=":")
        axis.set(
            xlabel="segment", ylabel=f"{len(busy)} slots in use", xticks=range(0, steps, -(-steps // 16))
        )
        axis.figure.colorbar(image, ax=axis, label=first)

    in_banks = f"; {banks} banks" if banks > 1 else ""
    idle = "" if dead is None else f" {dead} slots were never written or read."
    return View(
        kind="slots",
        title=title,
        summary=f"{slots} slots over {steps} segments, coloured by {first}{in_banks}.{idle}",
        arrays=life,
        draw=draw,
        times=steps,
        items=slots,
        item=int(life[first].max(0).argmax()),
        unit="segment",
        words={"banks": banks, "segment_length": segment_length},
        choices={"show": list(life), "order": ["index", "most first"]},
        group=group,
        tokens_per_time=segment_length or 1,
        page=4,
        size=(8, 3.4),
    )
