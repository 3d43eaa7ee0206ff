"""What a test does in the browser: a sheet that listens for errors, and the lab's notebooks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# JupyterLab on a loaded machine says these once while a kernel starts, and then goes on.
HARMLESS = ("Could not restore the debugger state", "kernel_ws_protocol", "status of 500", "status of 404")

READY = """async (path) => {
  const app = window.jupyterapp;
  if (!app) return false;
  await app.restored;
  const panel = app.shell.currentWidget;
  if (!panel?.context || panel.context.path !== path) return false;
  await panel.context.ready;
  await panel.revealed;
  await panel.sessionContext.ready;
  const kernel = panel.sessionContext.session?.kernel;
  return kernel?.connectionStatus === "connected" && kernel.status === "idle"
    && panel.content.widgets.length === panel.content.model.cells.length;
}"""
RUN = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
ASK = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  let text = "";
  const future = kernel.requestExecute({ code, store_history: false, silent: false });
  future.onIOPub = (message) => { if (message.content.text) text += message.content.text; };
  await future.done;
  return text;
}"""


class Sheet:
    """A page that keeps what went wrong in it: console errors, exceptions, requests to elsewhere."""

    def __init__(self, context: Any, address: str, allowed: str) -> None:
        self.errors: list[str] = []
        self.foreign: list[str] = []

        def route(route: Any) -> None:
            url = route.request.url
            if url.startswith((allowed, "data:", "blob:")):
                route.continue_()
            else:
                self.foreign.append(url)
                route.abort()

        context.route("**/*", route)
        self.page = context.new_page()
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)

    def assert_clean(self) -> None:
        assert not self.foreign, self.foreign
        bad = [error for error in self.errors if not any(known in error for known in HARMLESS)]
        assert not bad, bad

    def figure(self, kind: str, nth: int = 0) -> Figure:
        """The nth view of a kind, once it is drawn."""
        locator = self.page.locator(f'figure.memlib[data-kind="{kind}"]').nth(nth)
        locator.wait_for(state="attached", timeout=30_000)
        locator.scroll_into_view_if_needed()
        figure = Figure(locator)
        figure.wait("f => f.dataset.ready === 'true'")
        return figure


@dataclass
class Figure:
    """One view in a page."""

    locator: Any

    @property
    def canvas(self) -> Any:
        return self.locator.locator("canvas").first

    @property
    def readout(self) -> str:
        return self.locator.locator(".memlib-readout").inner_text()

    def data(self, name: str) -> str:
        return self.locator.evaluate("(f, name) => f.dataset[name] ?? ''", name)

    @property
    def time(self) -> int:
        return int(self.data("time"))

    @property
    def item(self) -> int:
        return int(self.data("item"))

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Poll a condition on the figure element: it is drawn on the browser's own clock."""
        end = time.monotonic() + seconds
        while not self.locator.evaluate(condition):
            assert time.monotonic() < end, f"not in {seconds} s: {condition}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        self.canvas.focus()
        for key in keys:
            self.canvas.press(key)

    def settle(self) -> None:
        """Until the next two frames are drawn."""
        self.locator.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def place(self, time: int, item: int) -> dict[str, float]:
        """Where a cell is, in the canvas' own pixels."""
        return self.locator.evaluate("(f, [t, s]) => f.memlib.place(t, s)", [time, item])

    def pixel(self, x: float, y: float) -> list[int]:
        return self.canvas.evaluate(
            """(canvas, [x, y]) => {
              const ratio = canvas.width / canvas.clientWidth, ctx = canvas.getContext("2d");
              return [...ctx.getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data];
            }""",
            [x, y],
        )

    def image(self) -> str:
        """All that is drawn, to tell whether it changed."""
        self.settle()
        return self.canvas.evaluate("canvas => canvas.toDataURL()")


@dataclass
class Lab:
    """A running JupyterLab."""

    address: str
    token: str
    home: Path
    log: Path
    opened: list[str] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"{self.address}/lab/tree/{path}?token={self.token}"

    def ready(self, sheet: Sheet, path: str, seconds: float = 90) -> None:
        """Until the notebook is the page's current one, with all its cells and an idle kernel."""
        end = time.monotonic() + seconds
        while not sheet.page.evaluate(READY, path):
            assert time.monotonic() < end, f"{path} was not ready in {seconds} s"
            time.sleep(0.2)

    def run_all(self, sheet: Sheet, seconds: float = 400) -> bool:
        """Run every cell; true where none failed."""
        sheet.page.set_default_timeout(seconds * 1000)
        return bool(sheet.page.evaluate(RUN))

    def ask(self, sheet: Sheet, code: str) -> str:
        """What the notebook's kernel prints for a line of code."""
        return sheet.page.evaluate(ASK, code).strip()
