"""Static pictures: figures with an alternative text, for notebooks and code hosts.

Colours are safe for colour-blind readers: cividis for magnitudes, and one fixed colour per role.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROLE = {
    "baseline": "#7a7a7a",
    "memory": "#0072b2",
    "input": "#0072b2",
    "forget": "#d55e00",
    "output": "#009e73",
    "attention": "#7a7a7a",
    "chance": "#000000",
    "loss": "#7a7a7a",
}


SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a7a7a", "#b58900"]


@dataclass(frozen=True)
class Picture:
    """A PNG with an alternative text; a notebook shows both."""

    png: bytes
    alt: str

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # Screen readers and nbconvert read the text from the HTML; code hosts that show no HTML use the PNG.
        png = base64.b64encode(self.png).decode("ascii")
        figure = f'<figure><img alt="{html.escape(self.alt)}" src="data:image/png;base64,{png}"></figure>'
        bundle = {"text/html": figure, "image/png": self.png, "text/plain": self.alt}
        return bundle, {"image/png": {"alt": self.alt}}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG."""
        Path(path).write_bytes(self.png)


def picture(draw: Callable[..., None], alt: str, size: tuple[float, float] = (8, 3)) -> Picture:
    """Draw on one matplotlib axis, off screen, and return the picture with its text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return Picture(buffer.getvalue(), alt)


def heat_map(
    values: np.ndarray,
    xlabel: str,
    ylabel: str,
    alt: str,
    marks: Sequence[str] = (),
    row_marks: Sequence[str] = (),
) -> Picture:
    """A matrix [y x] as colours; marks, row_marks: labels of columns and rows, if there are few."""

    def draw(axis: Any) -> None:
        image = axis.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest")
        if marks:
            axis.set_xticks(range(len(marks)), marks, fontsize=7)
        if row_marks:
            axis.set_yticks(range(len(row_marks)), row_marks, fontsize=7)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.figure.colorbar(image, ax=axis)

    return picture(draw, alt, (8, 3.4))


def curves(
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    alt: str,
    chance: float | None = None,
    log: bool = False,
) -> Picture:
    """Lines by name, each (x, y); a dotted line at chance; `log` puts both axes on log scales."""

    def draw(axis: Any) -> None:
        for name, (x, y) in lines.items():
            axis.plot(x, y, label=name, color=ROLE.get(name), linewidth=2, marker="o", markersize=3)
        if chance is not None:
            axis.axhline(chance, color=ROLE["chance"], linestyle=":", label="chance")
        if log:
            axis.set(xscale="log", yscale="log")
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.legend(frameon=False)

    return picture(draw, alt)


def colour_of(label: str, place: int = 0) -> str:
    """The lab's colour for a role, or for the line with a given index."""
    return ROLE.get(label.partition(",")[0], SERIES[place % len(SERIES)])


def borders(axis: Any, length: int, segment_length: int) -> None:
    """Dotted lines between the segments of a token axis."""
    if segment_length:
        for border in range(segment_length, length, segment_length):
            axis.axvline(border - 0.5, color="black", linestyle=":", linewidth=0.8)
