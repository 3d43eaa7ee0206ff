"""Stop training by a signal: save first, then leave with one line and the signal's exit status."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

# Ctrl-C; the request to end, also of schedulers; Slurm's warnings before a job is stopped (--signal).
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


class TrainingStopped(KeyboardInterrupt):
    """Training has saved and stopped because of a signal; the text says how to go on.

    exit_status: 128 + the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int, step: int, saved: Path) -> None:
        run = saved.parents[1]
        super().__init__(
            f"stopped at step {step}, saved in {saved}; go on with memlib train {run / 'config.yaml'} --out "
            f"{run} --resume"
        )
        self.exit_status = 128 + number


class StopSignals:
    """While active, signals that ask to stop are only noted; a second Ctrl-C stops at once.

    received: the first signal's number, 0 if there was none. If off, or outside the main thread, where Python
    allows no handlers, signals do what they did before.
    """

    def __init__(self, on: bool = True) -> None:
        self.on = on and threading.current_thread() is threading.main_thread()
        self.received = 0
        self.before: dict[int, Any] = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def __enter__(self) -> Self:
        if self.on:
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
