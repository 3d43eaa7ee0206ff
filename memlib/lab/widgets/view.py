"""A view of a recording, in three forms.

    view                      in a running lab: an interactive widget
    view.picture(time=3)      a static picture with a text, for stored notebooks and code hosts
    save_page("x.html", view) one HTML file that works without a kernel or a network

All three are made from the same frame. A view is made from a recording and needs no model.
"""

from __future__ import annotations

import os
from typing import Any

from memlib.lab.widgets.frame import Frame
from memlib.lab.widgets.host import Stage

FACES = "MEMLIB_FACES"  # "static" stores pictures only: `make notebooks` sets it


class View(Frame):
    """A frame that a notebook displays if it is the last line of a cell."""

    def live(self) -> Stage:
        """The interactive widget; keep it to move it from Python or to receive its moves."""
        return Stage(self)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = self.picture()._repr_mimebundle_()
        if os.environ.get(FACES) == "static":
            return data, metadata
        # No HTML here, so that an untrusted notebook shows the picture.
        live, _ = self.live()._repr_mimebundle_(**options) or ({}, {})
        return {**live, "image/png": data["image/png"], "text/plain": data["text/plain"]}, metadata
