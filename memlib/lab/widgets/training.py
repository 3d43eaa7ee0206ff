"""A live view of a training run on a background thread: watch, pause, single step, stop.

run = watch(trainer)
run                      # shows the widget; the cell returns, the run continues
await run.finished()     # in a later cell; the buttons still work while it waits
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets
import numpy as np

from memlib.lab.pictures import colour_of
from memlib.lab.widgets.host import Stage
from memlib.lab.widgets.view import FACES, View

if TYPE_CHECKING:
    from memlib.training.trainer import Trainer

HERTZ = 30  # maximum updates of the browser per second
UNKNOWN = -1.0  # stands for a value that is not measured yet
POINTS = 400  # maximum points of a curve in the browser; a longer run is thinned


class Watched:
    """A run on a background thread; `watch` starts it."""

    def __init__(
        self,
        trainer: Trainer,
        until: int | None,
        measure: Callable[[], dict[str, float]] | None,
        look: Callable[[], View] | None,
        every: int,
    ) -> None:
        training = trainer.config.training
        self.trainer, self.measure, self.look, self.every = trainer, measure, look, every
        self.until = training.max_steps if until is None else min(until, training.max_steps)
        self.records: list[tuple[int, dict[str, float]]] = []
        self.measured: dict[str, float] = {}
        self.error: BaseException | None = None
        self.stopped, self.singles = False, 0
        self.gate = threading.Condition()
        self.paused = False
        self.pushed, self.pushes = 0.0, 0
        self.stage: Stage | None = None
        trainer.model.eval()
        # The first look happens before the first step; later looks happen on the training thread only.
        self.seen: View | None = look() if look is not None else None
        self.window: Stage | None = None
        self.thread = threading.Thread(target=self.work, name="memlib-training", daemon=True)

    # Actions of the buttons.

    def pause(self) -> None:
        """Pause after the current step, or continue if paused."""
        with self.gate:
            self.paused = not self.paused
            self.gate.notify_all()

    def step(self) -> None:
        """Run one step, then pause."""
        with self.gate:
            self.paused = True
            self.singles += 1
            self.gate.notify_all()

    def stop(self) -> None:
        """End the run; the model keeps its current weights."""
        with self.gate:
            self.stopped = True
            self.gate.notify_all()

    # Waiting for the end.

    async def finished(self) -> Trainer:
        """Wait without blocking the kernel; re-raises an exception of the run."""
        while self.thread.is_alive():
            await asyncio.sleep(0.02)
        return self.wait()

    def wait(self) -> Trainer:
        """Wait and block; for scripts, because in a notebook the buttons would be blocked too."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.trainer

    # The thread.

    def work(self) -> None:
        import torch

        torch.set_num_threads(self.trainer.config.training.num_threads)  # the setting is per thread
        try:
            self.trainer.train(until=self.until, progress=False, on_step=self.on_step)
        except BaseException as error:
            self.error = error
        finally:
            self.stopped = True
            # Store the final view in the widgets, so that a page opened later shows the end of the run.
            if self.stage is not None:
                self.stage.show(self.curves())
            if self.window is not None and self.seen is not None:
                self.window.show(self.seen)

    def on_step(self, step: int, record: dict[str, float]) -> bool:
        if step % self.every == 0 or step == self.until:
            self.take_a_look()
        self.records.append((step, {**record, **self.measured}))
        with self.gate:
            self.singles = max(0, self.singles - 1)
            self.push(force=self.paused)
            while self.paused and not self.singles and not self.stopped:
                self.gate.wait()
            return not self.stopped

    def take_a_look(self) -> None:
        """Measure and update the view between two steps, with the model in eval mode."""
        self.trainer.model.eval()  # the next step sets it back
        if self.measure is not None:
            self.measured = self.measure()
        if self.look is not None:
            self.seen = self.look()
        if self.window is not None and self.seen is not None:
            self.window.push(self.seen)

    # Display.

    @property
    def state(self) -> str:
        if self.error is not None:
            return f"failed: {type(self.error).__name__}"
        if self.stopped:
            return "finished" if self.trainer.step >= self.until else "stopped"
        return "paused" if self.paused else "training"

    def curves(self) -> View:
        return training_view(list(self.records), self.state, self.trainer.task.chance, bool(self.measure))

    def push(self, force: bool = False) -> None:
        now = time.monotonic()
        if self.stage is None or not (force or now - self.pushed >= 1 / HERTZ):
            return
        self.pushed, self.pushes = now, self.pushes + 1
        self.stage.push(self.curves())

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if os.environ.get(FACES) == "static":
            self.wait()
            return self.curves()._repr_mimebundle_(**options)
        if self.stage is None:
            self.stage = self.curves().live()
            for name in ("pause", "step", "stop"):
                self.stage.on_action(name, getattr(self, name))
        shown = self.stage
        if self.seen is not None:
            self.window = self.window or self.seen.live()
            shown = ipywidgets.VBox([self.stage, self.window])
        bundle = shown._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**(data or {}), "text/plain": f"a run of {self.until} steps, {self.state}"}, {}


def watch(
    trainer: Trainer,
    until: int | None = None,
    measure: Callable[[], dict[str, float]] | None = None,
    look: Callable[[], View] | None = None,
    every: int = 10,
) -> Watched:
    """Train on a background thread, up to step `until`, and show the run.

    measure: returns further values in 0 … 1 to show, by name; look: returns a view of the current model. Both
    are called every `every` steps, on the training thread between two steps. The weights equal those of
    `trainer.train()` bit for bit, as long as neither uses random numbers.
    """
    run = Watched(trainer, until, measure, look, every)
    run.thread.start()
    return run


def training_view(
    records: list[tuple[int, dict[str, float]]], state: str, chance: float, measured: bool
) -> View:
    """The curves of a run so far; a long run is thinned to at most POINTS points, including the last."""
    taken = sorted({int(i) for i in np.linspace(0, len(records) - 1, min(POINTS, len(records)))})
    kept = [records[i] for i in taken] or [(0, {"loss": 0.0, "accuracy": 0.0})]
    names = [n for n in kept[-1][1] if n not in ("loss", "grad_norm") and not n.startswith("lr_")]
    steps = np.array([step for step, _ in kept], dtype=np.int32)
    loss = np.array([record["loss"] for _, record in kept], dtype=np.float32)
    parts = np.array([[record.get(n, UNKNOWN) for _, record in kept] for n in names], dtype=np.float32)

    def draw(axis: Any, _time: int) -> None:
        axis.plot(
            steps, loss / max(float(loss.max()), 1e-9), color=colour_of("loss"), label="loss / maximum loss"
        )
        for i, (name, line) in enumerate(zip(names, parts, strict=True)):
            axis.plot(steps[line >= 0], line[line >= 0], color=colour_of(name, i), label=name)
        axis.axhline(chance, color="black", linestyle=":", linewidth=1, label="chance")
        axis.set(xlabel="step", ylim=(-0.03, 1.05))
        axis.legend(frameon=False, ncols=2 + len(names), loc="lower right", bbox_to_anchor=(1, 1))

    said = ", ".join(f"{name} {line[-1]:.3f}" for name, line in zip(names, parts, strict=True))
    return View(
        kind="training",
        title="Training",
        summary=f"Step {steps[-1]}, {state}: loss {loss[-1]:.3f}, {said}; chance {chance:.3f}.",
        arrays={"steps": steps, "loss": loss, "parts": parts},
        draw=draw,
        times=len(kept),
        unit="record",
        words={"names": names, "state": state, "chance": chance},
        group="",
        follow=True,
    )
