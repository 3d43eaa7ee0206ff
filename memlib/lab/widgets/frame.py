"""A frame: the data of a view, namely arrays, labels, and a summary in words for screen readers.

A frame is drawn as a static picture, or packed for the front end of its `kind`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from memlib.lab.pictures import Picture, picture
from memlib.lab.trace import Trace


@dataclass(frozen=True)
class Frame:
    """Data that the front end of its `kind` draws.

    times, items: numbers of positions of the cursor; unit: name of one time; choices: named lists of options,
    the first of which is the default; words: labels as JSON; arrays: float32 or int32. Views of one `group`
    move together: one time is `tokens_per_time` tokens. `draw(axis, time)` draws the static picture.
    """

    kind: str
    title: str
    summary: str
    arrays: Mapping[str, np.ndarray]
    draw: Callable[[Any, int], None]
    times: int
    items: int = 1
    unit: str = "token"
    words: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    group: str = ""
    tokens_per_time: int = 1
    page: int = 10
    time: int = 0
    item: int = 0
    follow: bool = False
    size: tuple[float, float] = (8, 3)

    def __post_init__(self) -> None:
        if self.times < 1 or self.items < 1:
            raise ValueError(
                f"{self.title}: {self.times} times and {self.items} items; a view needs at least one of each"
            )
        for name, array in self.arrays.items():
            if array.dtype not in (np.float32, np.int32):
                raise ValueError(f"{self.title}: array {name} is {array.dtype}; use float32 or int32")
            if not np.isfinite(array).all():
                raise ValueError(f"{self.title}: array {name} has values that are not finite")

    def at(self, time: int | None = None, item: int | None = None) -> Self:
        """The same view at another time or item."""
        moved = replace(
            self, time=self.time if time is None else time, item=self.item if item is None else item
        )
        moved.check(moved.time, moved.item)
        return moved

    def check(self, time: int, item: int = 0) -> None:
        if not (0 <= time < self.times and 0 <= item < self.items):
            raise IndexError(
                f"{self.title}: {self.unit} {time}, item {item}; it has {self.unit}s 0 to {self.times - 1} "
                f"and items 0 to {self.items - 1}"
            )

    def picture(self, time: int | None = None) -> Picture:
        """The static picture at a time: a PNG with its text."""
        shown = self.time if time is None else time
        self.check(shown)
        return picture(lambda axis: self.draw(axis, shown), self.summary, self.size)


PLAIN = ["kind", "title", "summary", "times", "items", "unit", "group", "tokens_per_time", "page"]
PLAIN += ["time", "item", "follow"]


def pack(view: Frame, precision: str = "f4") -> bytes:
    """Pack a frame for the front end: length, JSON header, arrays.

    precision: f4 keeps floats exactly; u2 and u1 round each array to 65,535 or 255 equal steps.
    """
    entries, body = [], bytearray()
    for name, array in view.arrays.items():
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "dtype": "i4"}
        values = np.ascontiguousarray(array)
        if array.dtype == np.float32:
            entry["dtype"] = precision
            if precision != "f4":
                values, entry["low"], entry["step"] = rounded(values, precision)
        body.extend(b"\0" * (-len(body) % 8))
        entry["offset"] = len(body)
        body.extend(values.tobytes())
        entries.append(entry)
    header = {name: getattr(view, name) for name in PLAIN} | {
        "choices": {name: list(values) for name, values in view.choices.items()},
        "words": dict(view.words),
    }
    # Offsets count from the start of the file: the header is padded to a size that does not depend on them.
    room = len(json.dumps(header | {"arrays": entries})) + 24 * len(entries) + 8
    start = 4 + room + (-(4 + room) % 8)
    for entry in entries:
        entry["offset"] += start
    text = json.dumps(header | {"arrays": entries}).ljust(start - 4)
    return struct.pack("<I", len(text)) + text.encode("ascii") + bytes(body)


def rounded(values: np.ndarray, precision: str) -> tuple[np.ndarray, float, float]:
    """Approximate values by low + step * q with integer q; returns q, low and step."""
    low, high = float(values.min()), float(values.max())
    steps = 65535 if precision == "u2" else 255
    step = (high - low) / steps or 1.0
    q = np.rint((values - low) / step)
    return q.astype("<u2" if precision == "u2" else "u1"), low, step


def stream_group(trace: Trace, row: int) -> str:
    """The group name of all views of one stream, so that they move together."""
    return f"stream-{zlib.crc32(trace['tokens'].at(batch=row).values.tobytes()):08x}"
