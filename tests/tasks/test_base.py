"""What holds for every generated task."""

import subprocess
import sys
import time
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch

from memlib.config import RecallConfig, TaskConfig
from memlib.tasks import TASKS, Recall, make_task


def same(left, right):
    pairs = [(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)]
    return all(one is other is None or torch.equal(one, other) for one, other in pairs)


def test_shapes_types_and_vocabulary(task):
    batch = task.batch(8, 0)
    t = task.segments * task.segment_length
    for part, kind in ((batch.tokens, torch.int64), (batch.targets, torch.int64)):
        assert part.shape == (8, t) and part.dtype == kind and part.is_contiguous()
        assert part.min() >= 0 and part.max() < task.vocab_size <= 256
    assert batch.scored.shape == (8, t) and batch.scored.dtype == torch.bool
    assert batch.starts.tolist() == [True] * 8 and not task.continues
    assert {task.name_of(i) for i in range(task.vocab_size)} >= {"_"}


def test_targets_are_the_next_tokens(task):
    batch = task.batch(8, 0)
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])


def test_questions_stand_in_the_last_segment_of_every_row(task):
    batch = task.batch(32, 0)
    before = (task.segments - 1) * task.segment_length
    assert not batch.scored[:, :before].any()
    asked = batch.scored.sum(1)
    assert asked.min() == asked.max() > 0


def test_a_batch_is_a_function_of_seed_split_and_step(make):
    batch = make().batch(8, 3, seed=5)
    assert same(batch, make().batch(8, 3, seed=5))
    for other in ({"step": 4}, {"seed": 6}, {"split": "test"}):
        arguments = {"step": 3, "seed": 5} | other
        assert not torch.equal(batch.tokens, make().batch(8, **arguments).tokens), other


def test_oracle_is_right_wherever_it_counts(task):
    for split in ("train", "test"):
        batch = task.batch(256, 1, split=split)
        assert torch.equal(task.oracle(batch.tokens)[batch.scored], batch.targets[batch.scored])


def test_oracle_does_not_look_ahead(task):
    batch = task.batch(4, 2)
    whole, cut = task.oracle(batch.tokens), batch.tokens.shape[1] - 5
    assert torch.equal(task.oracle(batch.tokens[:, :cut]), whole[:, :cut])


def test_training_draws_the_number_of_segments_and_testing_does_not(make):
    task = make(make().segments - 1)
    lengths = {task.batch(2, step).tokens.shape[1] for step in range(30)}
    assert lengths == {16 * (task.segments - 1), 16 * task.segments}
    tests = {task.batch(2, step, split="test").tokens.shape[1] for step in range(10)}
    assert tests == {16 * task.segments}
    short = next(b for b in (task.batch(64, s) for s in range(30)) if b.tokens.shape[1] in lengths)
    assert torch.equal(task.oracle(short.tokens)[short.scored], short.targets[short.scored])


def test_unknown_split_is_refused(task):
    with pytest.raises(ValueError, match="split = 'valid': expected one of train, test"):
        task.batch(2, 0, split="valid")


def test_segments_min_above_segments_is_refused():
    with pytest.raises(ValueError, match="segments_min = 5: at most segments = 4"):
        Recall(RecallConfig(), 16, 4, 5)


def test_every_task_of_the_configuration_can_be_made():
    names = get_args(get_type_hints(TaskConfig)["name"])
    assert set(names) == set(TASKS)
    for name in set(names) - {"text"}:
        task = make_task(TaskConfig(name=name, segments=5, segments_min=4), segment_length=32)
        assert type(task) is TASKS[name]
        assert (task.segments, task.segments_min, task.segment_length) == (5, 4, 32)
        assert 0 < task.chance < 1


def test_a_batch_moves_to_a_device_as_a_whole(task):
    moved = task.batch(2, 0).to("meta")
    parts = [getattr(moved, f.name) for f in fields(moved)]
    assert {part.device.type for part in parts if part is not None} == {"meta"}


def test_a_recall_batch_costs_under_two_milliseconds():
    task = Recall(RecallConfig(), 16, 4)
    seconds = []
    for repeat in range(5):
        begin = time.process_time()
        for step in range(20):
            task.batch(32, step, seed=repeat)
        seconds.append((time.process_time() - begin) / 20)
    assert min(seconds) < 2e-3


def test_importing_the_tasks_loads_no_data_library():
    check = "import sys, memlib.tasks; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
