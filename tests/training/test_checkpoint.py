"""Checkpoints: whole or not there, whatever happens while they are written; damage is refused."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from memlib.config import override
from memlib.models import MemoryTransformer
from memlib.training import checkpoint
from memlib.training.checkpoint import (
    CheckpointError,
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    set_seed,
)


class Killed(BaseException):
    """What stands for a kill: nothing in the code may catch it."""


def step_folder(run, step):
    return Path(run, "checkpoints", f"step-{step:07d}")


def save(run, step, model=None):
    """A checkpoint whose model says which step it is of."""
    model = model or nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(step)
    optimizer = torch.optim.AdamW(model.parameters())
    return save_checkpoint(model, step_folder(run, step), optimizer, progress={"step": step})


def load_latest(run):
    """The step that the newest checkpoint says it is of, in its progress and in its weights."""
    model = nn.Linear(2, 2)
    progress, _ = load_checkpoint(latest_checkpoint(run), model, torch.optim.AdamW(model.parameters()))
    assert (model.weight == progress["step"]).all()
    return progress["step"]


def named(state):
    return dict(state.named_tensors())


@pytest.mark.parametrize("tied", [False, True])
def test_model_optimizer_memory_and_progress_come_back_bit_for_bit(tiny, tied, tmp_path):
    config = tiny({"model.tie_embeddings": tied})
    first, second = MemoryTransformer(config), MemoryTransformer(config)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (first, second)]
    tokens = torch.randint(16, (3, 14))
    first(tokens, labels=tokens).loss.backward()
    optimizers[0].step()
    state = first(tokens).memory_state.detach()
    saved = save_checkpoint(first, tmp_path / "run" / "c", optimizers[0], state, {"step": 7, "note": "x"})

    progress, memory = load_checkpoint(saved, second, optimizers[1])
    assert progress == {"step": 7, "note": "x"}
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    (mine, groups), (theirs, other_groups) = (flatten_optimizer(o) for o in optimizers)
    assert json.dumps(groups) == json.dumps(other_groups) and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    restored = second.init_state(3).load(memory)
    assert all(torch.equal(named(state)[name], named(restored)[name]) for name in named(state))
    assert (second.head.weight is second.embedding.weight) == tied


def test_without_optimizer_and_memory_only_the_model_is_saved(tmp_path):
    saved = save_checkpoint(nn.Linear(2, 2), tmp_path / "c")
    assert load_checkpoint(saved) == ({}, None)
    assert sorted(os.listdir(saved)) == ["checkpoint.json", "model.safetensors", "random.safetensors"]


def draw():
    return random.random(), np.random.random(), np.random.standard_normal(), torch.rand(3).tolist()


def test_random_generators_go_on_where_they_were(tmp_path):
    set_seed(5)
    draw()
    save_checkpoint(nn.Linear(2, 2), tmp_path / "c")
    want = draw()
    set_seed(1)
    load_checkpoint(tmp_path / "c")
    assert draw() != want
    load_checkpoint(tmp_path / "c", restore_random=True)
    assert draw() == want
    set_seed(5)
    draw()


def kill_at(monkeypatch, point):
    """Kill the save at its point-th call of anything that touches the disk; a removal is half done."""
    count = itertools.count()

    def deadly(function):
        def call(*arguments, **keywords):
            if next(count) != point:
                return function(*arguments, **keywords)
            if function is remove and Path(arguments[0]).exists():
                next(Path(arguments[0]).iterdir()).unlink()
            raise Killed

        return call

    remove = shutil.rmtree
    for place, name in [
        (checkpoint, "save_model"),
        (checkpoint, "save_file"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (os, "fsync"),
        (os, "rename"),
        (shutil, "rmtree"),
    ]:
        monkeypatch.setattr(place, name, deadly(getattr(place, name)))


def test_a_save_killed_anywhere_leaves_the_last_checkpoint_or_the_new_one(tmp_path):
    outcomes = []
    for point in itertools.count():
        run = tmp_path / str(point)
        save(run, 1)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, point)
            try:
                save(run, 2)
                prune_checkpoints(run, keep=1)
                finished = True
            except Killed:
                finished = False
        outcomes.append(load_latest(run))
        if finished:
            break
        save(run, 3)
        prune_checkpoints(run, keep=1)
        assert os.listdir(run / "checkpoints") == ["step-0000003"]
        assert load_latest(run) == 3
    assert len(outcomes) > 12 and outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


def test_a_save_over_an_old_one_killed_anywhere_never_leaves_half_of_it(tmp_path):
    """At the same path: it holds the old one, the new one or, for a moment, nothing."""
    for point in itertools.count():
        target = tmp_path / str(point) / "c"
        save_checkpoint(nn.Linear(2, 2), target, progress={"step": 1})
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, point)
            try:
                save_checkpoint(nn.Linear(2, 2), target, progress={"step": 2})
                finished = True
            except Killed:
                finished = False
        if target.exists():
            assert load_checkpoint(target, nn.Linear(2, 2))[0]["step"] in (1, 2)
        save_checkpoint(nn.Linear(2, 2), target, progress={"step": 3})
        assert load_checkpoint(target)[0]["step"] == 3
        if finished:
            break
    assert os.listdir(target.parent) == ["c"]


SAVES_FOR_EVER = """
    import itertools, sys
    import torch
    from torch import nn
    from memlib.training.checkpoint import prune_checkpoints, save_checkpoint

    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in itertools.count(1):
        with torch.no_grad():
            model.weight.fill_(step)
        folder = f"{sys.argv[1]}/checkpoints/step-{step:07d}"
        save_checkpoint(model, folder, optimizer, progress={"step": step})
        prune_checkpoints(sys.argv[1], keep=2)
"""


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SAVES_FOR_EVER), str(tmp_path)])
    try:
        deadline = time.monotonic() + 120
        while latest_checkpoint(tmp_path) is None or latest_checkpoint(tmp_path).name < "step-0000005":
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL
    reached = load_latest(tmp_path)
    assert reached >= 5
    save(tmp_path, reached + 1)
    prune_checkpoints(tmp_path, keep=1)
    assert load_latest(tmp_path) == reached + 1


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "checkpoint.json"]
)
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "missing"])
def test_a_damaged_checkpoint_is_refused_and_says_what_to_do(tmp_path, file, damage):
    saved = save(tmp_path, 1)
    whole = (saved / file).read_bytes()
    changed = {"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\xff\xfe" * 40, "missing": b""}
    (saved / file).write_bytes(changed[damage])
    if damage == "missing":
        (saved / file).unlink()
    model = nn.Linear(2, 2)
    remedy = "latest_checkpoint" if damage == "missing" else "use an earlier checkpoint"
    with pytest.raises(CheckpointError, match=f"step-0000001: .*{remedy}"):
        load_checkpoint(saved, model, torch.optim.AdamW(model.parameters()), restore_random=True)


@pytest.mark.parametrize("content", ["[]", "{}", '{"progress": 3}'])
def test_a_document_of_another_kind_is_refused(tmp_path, content):
    saved = save(tmp_path, 1)
    (saved / "checkpoint.json").write_text(content)
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(saved, model, torch.optim.AdamW(model.parameters()), restore_random=True)


def test_a_model_of_another_shape_is_refused(tiny, tmp_path):
    saved = save_checkpoint(MemoryTransformer(tiny()), tmp_path / "c")
    other = MemoryTransformer(override(tiny(), {"model.hidden_dim": 32}))
    with pytest.raises(CheckpointError, match="the configuration it was saved with"):
        load_checkpoint(saved, other)


def test_nowhere_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="incomplete checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    assert latest_checkpoint(tmp_path) is None


def test_the_newest_checkpoint_is_the_latest_and_the_oldest_go(tmp_path):
    for step in (9, 10, 2, 100):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == step_folder(tmp_path, 100)
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-0000010", "step-0000100"]
