"""Controls that rebuild a view from their values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ipywidgets

from memlib.lab.widgets.view import FACES, View

Control = tuple[int, int] | tuple[float, float] | list[Any] | bool


class Form:
    """Sliders, menus and check boxes, with a view that is rebuilt from their values.

    >>> Form(lambda pairs, task: view_of(pairs, task), pairs=(1, 6), task=["recall", "copy"])

    build takes the controls' values by name and returns a view. A control is (low, high) of integers or
    floats, a list of choices, or True or False. It starts at `start[name]`, else at low, the first choice or
    the given truth value.
    """

    def __init__(
        self, build: Callable[..., View], start: dict[str, Any] | None = None, **controls: Control
    ) -> None:
        self.build = build
        self.controls = {
            name: control(name, kind, (start or {}).get(name)) for name, kind in controls.items()
        }
        self.stage = self.view().live()
        for widget in self.controls.values():
            widget.observe(lambda _change: self.stage.show(self.view()), "value")
        self.box = ipywidgets.VBox([ipywidgets.HBox(list(self.controls.values())), self.stage])

    def view(self) -> View:
        return self.build(**{name: widget.value for name, widget in self.controls.items()})

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if os.environ.get(FACES) == "static":
            return self.view()._repr_mimebundle_(**options)
        bundle = self.box._repr_mimebundle_(**options)
        picture = self.view().picture()
        return bundle | {"image/png": picture._repr_mimebundle_()[0]["image/png"], "text/plain": picture.alt}


def control(name: str, kind: Control, start: Any) -> ipywidgets.ValueWidget:
    """The widget for one control; raises TypeError for an unsupported control."""
    label: dict[str, Any] = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(kind, bool):
        return ipywidgets.Checkbox(value=kind if start is None else start, **label)
    if isinstance(kind, list):
        return ipywidgets.Dropdown(options=kind, value=kind[0] if start is None else start, **label)
    if isinstance(kind, tuple) and len(kind) == 2:
        slider = ipywidgets.IntSlider if isinstance(kind[0], int) else ipywidgets.FloatSlider
        low, high = kind
        return slider(
            min=low, max=high, value=low if start is None else start, continuous_update=False, **label
        )
    raise TypeError(f"{name} = {kind!r}: a control is (low, high), a list to choose from, or True or False")
