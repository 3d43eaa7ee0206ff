"""A view: one look into a model, with three faces.

    view                      in a running lab: drawn live in the browser, and you can move in it
    view.picture(time=3)      a figure with its text: what stored notebooks and code hosts show
    save_page("x.html", view) one file that works from disk, without a kernel or a network

All three come from the same frame. A view is made from a recording and knows no model.
"""

from __future__ import annotations

import os
from typing import Any

from memlib.lab.widgets.frame import Frame
from memlib.lab.widgets.host import Stage

FACES = "MEMLIB_FACES"  # "static" stores pictures only: `make notebooks` sets it


class View(Frame):
    """A frame that shows itself where it is the last line of a cell."""

    def live(self) -> Stage:
        """The live face: a widget, to be kept where Python wants to move it or hear of its moves."""
        return Stage(self)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = self.picture()._repr_mimebundle_()
        if os.environ.get(FACES) == "static":
            return data, metadata
        # Without the HTML: an untrusted notebook opened again falls back on the picture.
        live, _ = self.live()._repr_mimebundle_(**options) or ({}, {})
        return {**live, "image/png": data["image/png"], "text/plain": data["text/plain"]}, metadata
