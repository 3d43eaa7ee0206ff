"""The interactive form of a view: an anywidget that sends the packed view to the front end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from memlib.lab.widgets.frame import Frame, pack

FRONT = Path(__file__).parent / "front"


def front_end(face: str) -> str:
    """The JavaScript of the front end: the core, every view, and the file for jupyter or page."""
    faces = {"core", "jupyter", "page"}
    views = sorted(path for path in FRONT.glob("*.js") if path.stem not in faces)
    parts = [FRONT / "core.js", *views, FRONT / f"{face}.js"]
    return "\n".join(part.read_text(encoding="utf-8") for part in parts)


class Stage(anywidget.AnyWidget):
    """A view in the browser with its cursor.

    >>> stage = view.live()
    >>> stage.go(time=12)                       # move the cursor from Python
    >>> stage.on_move(lambda stage: print(stage.time))
    """

    _esm = front_end("jupyter")
    _css = (FRONT / "stage.css").read_text(encoding="utf-8")
    frame = traitlets.Bytes().tag(sync=True)

    def __init__(self, view: Frame) -> None:
        self.movers: list[Callable[[Stage], None]] = []
        self.actions: dict[str, Callable[[], None]] = {}
        self.view, self.time, self.item = view, view.time, view.item
        self.choice = {name: values[0] for name, values in view.choices.items()}
        super().__init__(frame=pack(view))
        # Custom messages, not a synced trait: they are handled at once while an async cell runs, but the
        # throttling of traits would wait for that cell to end.
        self.on_msg(lambda _widget, message, _buffers: self.hear(message))

    def show(self, view: Frame) -> None:
        """Replace the view."""
        self.adopt(view)
        self.frame = pack(view)

    def push(self, view: Frame) -> None:
        """Show a new version of a growing view without storing it; the browser may skip versions."""
        self.adopt(view)
        self.send({"type": "push"}, buffers=[pack(view)])

    def adopt(self, view: Frame) -> None:
        self.view = view
        self.time, self.item = min(self.time, view.times - 1), min(self.item, view.items - 1)

    def go(
        self, time: int | None = None, item: int | None = None, choice: Mapping[str, str] | None = None
    ) -> None:
        """Move the cursor, here and in every browser that shows the view."""
        message: dict[str, Any] = {"type": "cursor", "time": self.time, "item": self.item}
        message |= {name: at for name, at in (("time", time), ("item", item)) if at is not None}
        self.hear(message | {"choice": dict(choice or {})})
        change = {"time": self.time, "item": self.item, "choice": self.choice}
        self.send({"type": "go", "change": change})

    def on_move(self, mover: Callable[[Stage], None]) -> None:
        """Call `mover(stage)` whenever the cursor or a choice changes."""
        self.movers.append(mover)

    def on_action(self, name: str, run: Callable[[], None]) -> None:
        """Call `run()` when the button that sends `name` is pressed."""
        self.actions[name] = run

    def hear(self, message: Mapping[str, Any]) -> None:
        """Handle a message of the front end; raises IndexError or ValueError if it does not fit the view."""
        if message["type"] == "action":
            if message["name"] not in self.actions:
                raise ValueError(
                    f"no action {message['name']!r}; available: {', '.join(self.actions) or 'none'}"
                )
            self.actions[message["name"]]()
            return
        self.view.check(message["time"], message["item"])
        choice = self.choice | message.get("choice", {})
        for name, value in choice.items():
            if value not in self.view.choices.get(name, ()):
                offered = {name: list(values) for name, values in self.view.choices.items()}
                raise ValueError(f"{self.view.title}: no choice {name} = {value!r}; available: {offered}")
        self.time, self.item, self.choice = message["time"], message["item"], choice
        for mover in self.movers:
            mover(self)
