"""Helpers for every notebook: predictions, verdicts, exercises, a time budget.

lesson = Lesson("03", cpu_seconds=120)
guess = lesson.predict("Accuracy without memory, 0 to 1?", 0.5)
…
guess.compare(measured)
lesson.verdict({"equal to memlib's": same, "beats its control": better})
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memlib.files import write_text


def store_path() -> Path:
    """File of the predictions: in $MEMLIB_HOME, or .memlib in the home folder."""
    return Path(os.environ.get("MEMLIB_HOME", Path.home() / ".memlib")) / "predictions.json"


@dataclass(frozen=True)
class Prediction:
    """A prediction made before the run."""

    question: str
    expected: float

    def compare(self, measured: float, close: float = 0.1) -> None:
        """Print prediction and measurement; a difference up to `close` counts as right."""
        verdict = "you knew" if abs(self.expected - measured) <= close else "a surprise worth a thought"
        print(self.question)
        print(f"  you said {self.expected:g}, measured {measured:.3g}: {verdict}")


class Lesson:
    """The frame of one notebook: fixed seed, one torch thread, and a CPU-time budget."""

    def __init__(self, number: str, cpu_seconds: float, seed: int = 0) -> None:
        import torch

        from memlib.training.checkpoint import set_seed

        self.number, self.cpu_seconds = number, cpu_seconds
        torch.set_num_threads(1)
        set_seed(seed)

    def predict(self, question: str, expected: float) -> Prediction:
        """Store a prediction (in this notebook and on disk) for comparison with the measurement."""
        path = store_path()
        try:
            kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            kept[f"{self.number}: {question}"] = expected
            write_text(path, json.dumps(kept, indent=1))
        except (OSError, json.JSONDecodeError) as error:
            print(f"(stored in this notebook only: {path}: {error})")
        return Prediction(question, expected)

    def verdict(self, claims: dict[str, bool]) -> None:
        """Print each claim with yes or NO; the notebook's test compares these lines."""
        width = max(len(claim) for claim in claims)
        for claim, holds in claims.items():
            print(f"{claim:.<{width + 3}} {'yes' if holds else 'NO'}")

    @contextmanager
    def exercise(self, name: str) -> Iterator[None]:
        """Run an exercise's checks; prints the result, and never stops the notebook."""
        try:
            yield
        except NotImplementedError:
            print(f"○ {name}: not tried yet")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = str(error) or where.line or type(error).__name__
            print(f"✗ {name}: not yet ({reason})")
        else:
            print(f"✓ {name}: solved")

    def within_budget(self) -> bool:
        """Whether this notebook's process, and those it started, are within its CPU time; prints it."""
        used = sum(os.times()[:4])
        print(f"{used:.0f} CPU-seconds used of {self.cpu_seconds:g}")
        return used <= self.cpu_seconds
