"""Watching a run changes nothing about it, and its buttons do what they say."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from memlib import Trainer, load_config, override, record
from memlib.lab.widgets import gates_over_time
from memlib.lab.widgets import training as module
from memlib.lab.widgets.training import POINTS, training_view, watch

SMALL = {
    "training.max_steps": 12,
    "training.batch_size": 4,
    "task.segments": 2,
    "task.segments_min": 2,
    "memory.internal.num_slots": 16,
}


def trainer(**changes) -> Trainer:
    return Trainer(override(load_config("recall_internal"), SMALL | changes))


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_watched_weights_are_plain_weights():
    plain = trainer()
    plain.train(progress=False)
    watched = watch(trainer()).wait()
    for (name, p), q in zip(plain.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_pause_step_stop():
    run = watch(trainer(**{"training.max_steps": 100_000}))
    until(lambda: run.trainer.step >= 2)
    run.pause()
    until(lambda: run.state == "paused")
    time.sleep(0.3)
    held = run.trainer.step
    time.sleep(0.3)
    assert run.trainer.step == held
    run.step()
    until(lambda: run.trainer.step == held + 1)
    time.sleep(0.2)
    assert run.trainer.step == held + 1
    run.pause()  # once more goes on
    until(lambda: run.trainer.step > held + 5)
    run.stop()
    run.wait()
    assert run.state == "stopped" and not run.thread.is_alive()


def test_what_the_run_raises_is_raised_where_one_waits():
    def measure():
        raise KeyError("broken measure")

    run = watch(trainer(), measure=measure, every=3)
    with pytest.raises(KeyError, match="broken measure"):
        asyncio.run(run.finished())
    assert run.state == "failed: KeyError" and run.trainer.step == 3


def test_measures_are_in_the_curve():
    run = watch(trainer(), measure=lambda: {"half": 0.5}, every=4)
    asyncio.run(run.finished())
    view = run.curves()
    assert view.words["names"] == ["accuracy", "half"] and view.words["state"] == "finished"
    assert view.arrays["parts"][1].tolist() == [-1, -1, -1] + [0.5] * 9
    assert view.arrays["steps"].tolist() == list(range(1, 13))


def test_looking_inside_changes_nothing_and_shows_the_model_of_now():
    """With dropout on: a look that left the model, or the random numbers, otherwise would show."""
    plain = trainer(**{"model.dropout": 0.2})
    plain.train(progress=False)
    mine = trainer(**{"model.dropout": 0.2})
    tokens = mine.task.batch(1, 0, split="test").tokens
    seen = []

    def look():
        assert not mine.model.training
        with record(mine.model) as trace, torch.no_grad():
            mine.model(tokens)
        seen.append(gates_over_time(trace, segment_length=16))
        return seen[-1]

    run = watch(mine, look=look, every=4)
    run._repr_mimebundle_()
    run.wait()
    for p, q in zip(plain.model.parameters(), mine.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert run.window.view is seen[-1] and len(seen) >= 3
    assert not (seen[0].arrays["lines"] == seen[-1].arrays["lines"]).all()


def test_pushes_are_dropped_beyond_the_rate(monkeypatch):
    run = watch(trainer(**{"training.max_steps": 40}))
    run._repr_mimebundle_()
    sent = []
    monkeypatch.setattr(run.stage, "send", lambda *message, **_: sent.append(time.monotonic()))
    begun = time.monotonic()
    run.wait()
    assert 1 <= len(sent) <= (time.monotonic() - begun) * module.HERTZ + 2


def test_a_long_run_is_thinned_and_keeps_its_end():
    records = [(step, {"loss": 1.0 / step, "accuracy": 0.5}) for step in range(1, 5001)]
    view = training_view(records, "training", 0.1, False)
    assert view.times == POINTS and view.arrays["steps"][-1] == 5000 and view.follow


def test_on_step_ends_training():
    run = trainer()
    seen = []
    run.train(progress=False, on_step=lambda step, record: seen.append((step, record["loss"])) or step < 5)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5] and run.step == 5
