"""Signals and full disks: training saves, says in one line how to go on, and leaves; nothing half is left."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from memlib.config import save_config
from memlib.training import checkpoint
from memlib.training.checkpoint import CheckpointError, latest_checkpoint
from memlib.training.stopping import StopSignals, TrainingStopped
from memlib.training.trainer import Trainer, load_run


def signal_in_step(trainer, number, step):
    """Send this process a signal in the middle of a step."""
    inner = trainer.train_step

    def train_step():
        if trainer.step == step:
            os.kill(os.getpid(), number)
        return inner()

    trainer.train_step = train_step


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_as_if_nothing_had_been(name, tiny, tmp_path):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    trainer = Trainer(tiny(), tmp_path / "run")
    signal_in_step(trainer, number, step=1)  # before the first save_steps
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train(progress=False)
    saved = tmp_path / "run" / "checkpoints" / "step-0000002"
    assert latest_checkpoint(tmp_path / "run") == saved
    assert str(stopped.value) == (
        f"stopped at step 2, saved in {saved}; go on with memlib train {tmp_path / 'run' / 'config.yaml'} "
        f"--out {tmp_path / 'run'} --resume"
    )
    assert stopped.value.exit_status == 128 + number
    assert signal.getsignal(number) == before
    resumed = load_run(tmp_path / "run")
    resumed.train(progress=False)
    straight = Trainer(tiny(), tmp_path / "straight")
    straight.train(progress=False)
    for mine, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    inner = trainer.train_step

    def train_step():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return inner()

    trainer.train_step = train_step
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train(progress=False)
    assert not isinstance(stopped.value, TrainingStopped) and trainer.step == 0


def test_a_signal_in_the_last_evaluation_is_not_lost(tiny, tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    evaluate = trainer.evaluate

    def slow():
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate()

    trainer.evaluate = slow
    with pytest.raises(TrainingStopped, match="stopped at step 6"):
        trainer.train(progress=False)


def test_without_a_folder_ctrl_c_is_pythons(tiny):
    trainer = Trainer(tiny())
    signal_in_step(trainer, signal.SIGINT, step=1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train(progress=False)
    assert not isinstance(stopped.value, TrainingStopped) and trainer.step == 1


def test_outside_the_main_thread_handlers_stay(tiny, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def enter():
        with StopSignals() as signals:
            found.append((signals.on, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_the_command_leaves_with_one_line_and_the_status_of_the_signal(tiny, tmp_path):
    save_config(tiny({"training.max_steps": 10**6, "training.save_steps": 10**6}), tmp_path / "endless.yaml")
    command = [sys.executable, "-m", "memlib.cli", "train", str(tmp_path / "endless.yaml")]
    child = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "log.jsonl"
    try:
        while not (log.exists() and log.read_text()):
            assert child.poll() is None, child.stderr.read()
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 143
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("memlib: stopped at step ")
    assert errors.endswith(f"--out {tmp_path / 'run'} --resume\n")
    assert latest_checkpoint(tmp_path / "run") is not None


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint.json"])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(file, tiny, tmp_path, monkeypatch):
    trainer = Trainer(tiny(), tmp_path)
    trainer.train(until=1, progress=False)
    flush = checkpoint.flush

    def full(path):
        if Path(path).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(CheckpointError) as error:
        trainer.train(until=2, progress=False)
    message = str(error.value)
    assert "\n" not in message and "step-0000002: cannot be written" in message
    assert "No space left on device" in message and "free space" in message
    assert os.listdir(tmp_path / "checkpoints") == ["step-0000001"]
    monkeypatch.undo()
    assert load_run(tmp_path).step == 1


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="mounts a file system of 1 MiB")
def test_a_disk_that_is_really_full(tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        trainer = Trainer(tiny(), disk / "run")
        trainer.train(until=1, progress=False)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))
        trainer.step += 1
        with pytest.raises(CheckpointError, match=r"step-0000002: cannot be written .*[Nn]o space left"):
            trainer.save()
        assert os.listdir(disk / "run" / "checkpoints") == ["step-0000001"]
        assert load_run(disk / "run").step == 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
