"""Move every control, so that a broken callback in a notebook's widgets fails the notebook's test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets

from memlib.lab.widgets.form import Form
from memlib.lab.widgets.host import Stage
from memlib.lab.widgets.page import figure
from memlib.lab.widgets.training import Watched
from memlib.lab.widgets.view import View


def drive(*things: View | Stage | Form | Watched) -> int:
    """Move each control to its minimum, middle and maximum; returns the number of moves.

    Exceptions of callbacks are raised. A view is also drawn at three times, and packed for a page.
    """
    moves = 0
    for thing in things:
        if isinstance(thing, Form):
            for widget in thing.controls.values():
                before = widget.value
                for value in positions(widget):
                    widget.value = value
                    moves += 1
                widget.value = before
            moves += drive(thing.stage)
        elif isinstance(thing, View):
            moves += drive_stage(thing.live())
        elif isinstance(thing, Watched):
            moves += drive(thing.curves())
        else:
            moves += drive_stage(thing)
    return moves


def drive_stage(stage: Stage) -> int:
    view, moves = stage.view, 0
    for name, values in view.choices.items():
        for value in values:
            stage.go(choice={name: value})
            moves += 1
    for time in three(view.times):
        for item in three(view.items):
            stage.go(time=time, item=item)
            moves += 1
        view.picture(time)
    figure(view)
    return moves


def positions(widget: ipywidgets.ValueWidget) -> Sequence[Any]:
    """Values to which a control is moved."""
    if isinstance(widget, ipywidgets.Dropdown):
        return [value for _, value in widget._options_full]
    if isinstance(widget, ipywidgets.Checkbox):
        return [True, False]
    middle = (widget.min + widget.max) / 2
    return [widget.min, int(middle) if isinstance(widget.value, int) else middle, widget.max]


def three(count: int) -> list[int]:
    """First, middle and last of `count`."""
    return sorted({0, count // 2, count - 1})
