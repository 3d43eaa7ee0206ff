"""Static pictures of traces: figures with an alternative text, for notebooks and code hosts.

Colours are safe for colour-blind readers: cividis for sizes, and one fixed colour per role.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memlib.lab.trace import LabelledArray, Trace

ROLE = {
    "baseline": "#7a7a7a",
    "memory": "#0072b2",
    "input": "#0072b2",
    "forget": "#d55e00",
    "output": "#009e73",
    "attention": "#7a7a7a",
    "chance": "#000000",
}


@dataclass(frozen=True)
class Picture:
    """A PNG and the words that say what it shows; displays as both."""

    png: bytes
    alt: str

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"image/png": self.png, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def picture(draw: Callable[..., None], alt: str, size: tuple[float, float] = (8, 3)) -> Picture:
    """Draw on one matplotlib axis, off screen, and keep the result with its text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return Picture(buffer.getvalue(), alt)


def gates_over_time(
    trace: Trace, names: Sequence[str], row: int = 0, layer: int = 0, segment_length: int = 0
) -> Picture:
    """Gate values over the stream's tokens, one line a gate; dotted lines are segment borders."""
    gates = {name: _per_token(trace[name], row, layer) for name in names}

    def draw(axis: Any) -> None:
        for name, values in gates.items():
            label = name.rsplit(".", 1)[-1]
            axis.plot(values, label=label, color=ROLE.get(label), drawstyle="steps-mid", linewidth=1.6)
        _borders(axis, max(map(len, gates.values())), segment_length)
        axis.set(xlabel="token", ylabel="gate", ylim=(-0.05, 1.05))
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(gates), frameon=False)

    said = "; ".join(f"{name} from {v.min():.2f} to {v.max():.2f}" for name, v in gates.items())
    return picture(draw, f"Gate values over {max(map(len, gates.values()))} tokens: {said}.")


def slots_over_time(
    trace: Trace, name: str, row: int = 0, layer: int = 0, segment_length: int = 0
) -> Picture:
    """Which slots each token writes or reads: slots up, tokens across; only slots used at all."""
    weight = trace[name].at(layer=layer, batch=row).values
    used = np.flatnonzero(weight.max(0) > 0.1)
    order = used[np.argsort(weight[:, used].argmax(0))]

    def draw(axis: Any) -> None:
        image = axis.imshow(
            weight[:, order].T, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest"
        )
        _borders(axis, len(weight), segment_length)
        axis.set(xlabel="token", ylabel=f"{len(order)} slots in use")
        axis.figure.colorbar(image, ax=axis, label="weight")

    alt = f"Weights of {len(order)} used slots (of {weight.shape[1]}) over {len(weight)} tokens."
    return picture(draw, alt, (8, 3.4))


def heat_map(
    values: np.ndarray,
    xlabel: str,
    ylabel: str,
    alt: str,
    marks: Sequence[str] = (),
    row_marks: Sequence[str] = (),
) -> Picture:
    """A matrix as colours, [y x]; `marks` and `row_marks` name columns and rows where they are few."""

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


def _per_token(array: LabelledArray, row: int, layer: int) -> np.ndarray:
    """One value per token: what is left of other axes is averaged."""
    values = array.at(layer=layer, batch=row)
    for axis in values.axes:
        if axis != "token":
            values = values.mean(axis)
    return values.values


def _borders(axis: Any, length: int, segment_length: int) -> None:
    if segment_length:
        for border in range(segment_length, length, segment_length):
            axis.axvline(border - 0.5, color="black", linestyle=":", linewidth=0.8)
