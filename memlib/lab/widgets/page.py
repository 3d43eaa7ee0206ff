"""Views as one self-contained HTML file, which needs no kernel and no network."""

from __future__ import annotations

import base64
import html
import os
import zlib

from memlib.files import write_text
from memlib.lab.widgets.frame import Frame, pack
from memlib.lab.widgets.host import FRONT, front_end

LIMIT = 1_000_000
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ margin: 16px auto; max-width: 1080px; padding: 0 12px; font-family: system-ui, sans-serif; }}
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{figures}
</main>
<script type="module">
{script}</script>
</body>
</html>
"""


def page(*views: Frame, title: str = "") -> str:
    """The HTML of one page with these views; views of one group move together.

    A view larger than a megabyte is rounded to 65,535 equal steps, then to 255; its numbers then begin
    with ≈. Raises ValueError if it is still larger.
    """
    if not views:
        raise ValueError("a page needs at least one view")
    figures = [f'<script type="text/plain" data-memlib>{figure(view)}</script>' for view in views]
    return PAGE.format(
        title=html.escape(title or views[0].title),
        style=(FRONT / "stage.css").read_text(encoding="utf-8"),
        figures="\n".join(figures),
        script=front_end("page"),
    )


def figure(view: Frame) -> str:
    """A packed and compressed view as base64 text, at the finest precision that fits the limit."""
    for precision in ("f4", "u2", "u1"):
        text = base64.b64encode(zlib.compress(pack(view, precision), 9)).decode("ascii")
        if len(text) <= LIMIT:
            return text
    raise ValueError(
        f"{view.title}: {len(text):,} bytes in a page, more than {LIMIT:,}; show fewer times or items"
    )


def save_page(path: str | os.PathLike[str], *views: Frame, title: str = "") -> None:
    """Write the views as one self-contained HTML file, atomically."""
    write_text(path, page(*views, title=title))
