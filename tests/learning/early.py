"""Training that ends as soon as it has done what it is for."""

from __future__ import annotations

from memlib.training.trainer import Trainer

ACCURACY, BATCHES = 0.98, 5


def train_until_learned(trainer: Trainer, until: int | None = None) -> Trainer:
    """Train until `BATCHES` batches in a row reach `ACCURACY`, or to step `until` (default: the end).

    For claims that a model learns within its steps. A control, which does not learn, trains to the end.
    """
    recent: list[float] = []

    def on_step(step: int, record: dict[str, float]) -> bool:
        recent.append(record["accuracy"])
        return len(recent) < BATCHES or min(recent[-BATCHES:]) < ACCURACY

    trainer.train(until, progress=False, on_step=on_step)
    return trainer
