"""A recorded kernel launch, access by access: which elements of each tensor a program loads and stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from memlib.lab.launches import Launch, launch_of
from memlib.lab.widgets.view import View

if TYPE_CHECKING:
    from memlib_kernels.interpreter import Record

WIDTH, HEIGHT, LABEL, GAP = 8.0, 3.2, 0.22, 0.14  # of the static picture, in inches
UNTOUCHED, OTHERS = "#f0f0f0", "#c4c4c4"
# What this access touches, and lighter, what its program touched before: loads, stores, pairs.
COLOURS = {"load": ("#d55e00", "#efbb93"), "store": ("#0072b2", "#8fc3e3"), "pair": ("#009e73", "#8fd3be")}


def launch_view(
    record: Record,
    columns: Mapping[str, int],
    launch: int = 0,
    pairs: tuple[str, str] | None = None,
    title: str = "",
) -> View:
    """The accesses of one launch in order, with the bytes and operations so far.

    record: of `interpreted(record=True)`; columns: the tensors to show, with the elements of a row of each, 1
    for a column; pairs: two of them, to show the pairs of their rows that met in a program (launches.py).
    Raises ValueError if the launch does not touch these tensors.
    """
    seen = launch_of(record, columns, launch, pairs)
    loaded = np.cumsum(np.where(seen.store, 0, seen.bytes))
    stored = np.cumsum(np.where(seen.store, seen.bytes, 0))
    once, flops = seen.loaded_once(), np.cumsum(seen.flops)
    if flops[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{flops[-1]:,} operations are more than a view counts; record a smaller launch")
    counts = {"starts": seen.starts, "elements": seen.elements, "program": seen.program, "grid": seen.grid}
    counts |= {"store": seen.store, "loaded": loaded, "once": once, "stored": stored, "flops": flops}
    programs = len(seen.programs)
    worked = f"; {flops[-1]:,} operations in products" if flops[-1] else ""
    return View(
        kind="launch",
        title=title or f"{seen.kernel}: {programs} programs",
        summary=f"{seen.kernel}: {programs} programs, {len(seen.grid)} loads and stores. "
        f"{loaded[-1]:,} bytes loaded, {once[-1]:,} if each were loaded once; {stored[-1]:,} stored{worked}."
        f"{met(seen, pairs)}",
        arrays={name: np.asarray(values, dtype=np.int32) for name, values in counts.items()},
        draw=lambda axis, time: draw(axis, seen, time),
        times=len(seen.grid),
        items=int(seen.first[-1]),
        unit="step",
        words={
            "names": seen.names,
            "rows": [int(n) for n in seen.rows],
            "columns": [int(n) for n in seen.columns],
            "stored_nowhere": [not size for size in seen.itemsize],
            "programs": seen.programs,
            "lines": [int(line) for line in seen.line],
            "says": [seen.say(access) for access in range(len(seen.grid))],
        },
        choices={"show": ["the current program", "how often each element is touched"]},
        page=10,
        time=len(seen.grid) - 1,
        size=(WIDTH, layout(seen)[1]),
    )


def met(seen: Launch, pairs: tuple[str, str] | None) -> str:
    """How many pairs met, in words."""
    if pairs is None:
        return ""
    inside = np.unique(seen.elements[seen.elements >= seen.first[-2]]).size
    return (
        f" {inside:,} of {seen.first[-1] - seen.first[-2]:,} pairs of rows of {pairs[0]} and {pairs[1]} met."
    )


def label_of(seen: Launch, grid: int) -> str:
    return f"{seen.names[grid]}  {seen.rows[grid]} × {seen.columns[grid]}"


def layout(seen: Launch) -> tuple[list[tuple[float, float, float, float]], float]:
    """Left, top, width and height of each grid in inches, as large as fits; and the height of the picture."""
    for cell in np.geomspace(0.16, 0.002, 60):
        boxes: list[tuple[float, float, float, float]] = []
        x, y, tall = 0.0, 0.0, 0.0
        for grid, (rows, columns) in enumerate(zip(seen.rows, seen.columns, strict=True)):
            wide, high = (float(max(3, side) * cell) for side in (columns, rows))
            room = max(wide, 0.075 * len(label_of(seen, grid)))
            if x and x + room > WIDTH:
                x, y, tall = 0.0, y + LABEL + tall + GAP, 0.0
            boxes.append((x, y + LABEL, wide, high))
            x, tall = x + room + GAP, max(tall, high)
        if y + LABEL + tall <= HEIGHT and all(x + wide <= WIDTH for x, _, wide, _ in boxes):
            break
    return boxes, y + LABEL + tall + 2 * LABEL


def colours_at(seen: Launch, time: int) -> np.ndarray:
    """The colour of each element at an access: [elements 3], uint8."""
    colours = np.tile(rgb(UNTOUCHED), (seen.first[-1], 1))
    nowhere = np.repeat(seen.itemsize == 0, seen.rows * seen.columns)
    mine = seen.program[: time + 1] == seen.program[time]
    for access in np.concatenate((np.flatnonzero(~mine), np.flatnonzero(mine))):
        touched = seen.touched(access)
        own = COLOURS["store" if seen.store[access] else "load"]
        for (now, before), which in ((own, ~nowhere[touched]), (COLOURS["pair"], nowhere[touched])):
            shade = now if access == time else before if mine[access] else OTHERS
            colours[touched[which]] = rgb(shade)
    return colours


def rgb(colour: str) -> np.ndarray:
    """#rrggbb as three numbers."""
    return np.frombuffer(bytes.fromhex(colour[1:]), dtype=np.uint8)


def draw(axis: Any, seen: Launch, time: int) -> None:
    """What this access touches, what its program touched before it, and what other programs did."""
    boxes, height = layout(seen)
    colours = colours_at(seen, time)
    for grid, (x, y, wide, high) in enumerate(boxes):
        shape = (seen.rows[grid], seen.columns[grid], 3)
        pixels = colours[seen.first[grid] : seen.first[grid + 1]].reshape(shape)
        axis.imshow(pixels, extent=(x, x + wide, y + high, y), interpolation="nearest")
        axis.plot(
            [x, x + wide, x + wide, x, x], [y, y, y + high, y + high, y], color="#7a7a7a", linewidth=0.5
        )
        axis.text(x, y - 0.05, label_of(seen, grid), size=8)
    axis.text(0, height - 0.24, f"step {time} of {len(seen.grid) - 1}: {seen.say(time)}", size=8)
    legend = [("loaded now", COLOURS["load"][0]), ("stored now", COLOURS["store"][0])]
    legend += [("pairs met now", COLOURS["pair"][0])] if 0 in seen.itemsize else []
    legend += [("before, in this program", COLOURS["load"][1]), ("programs before", OTHERS)]
    x = 0.0
    for words, colour in legend:
        axis.text(x, height - 0.02, "■", size=9, color=colour)
        axis.text(x + 0.14, height - 0.02, words, size=8)
        x += 0.34 + 0.072 * len(words)
    axis.set(xlim=(-0.02, WIDTH), ylim=(height, 0), aspect="equal")
    axis.axis("off")
