"""Kill a run of two processes at random moments, also during saves; each time it must go on by itself.

    python -m tests.training.parallel.kills FOLDER KILLS [SEED]

It saves at every step, in every second life in the background. In each life one process or both get SIGKILL
at a random moment of some three steps. At the end the run must be, bit for bit, one that was never killed.
Prints one line of JSON: the kills, those that left a save half done, and what differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils.tensorboard import SummaryWriter  # noqa: F401, imported once, before the forks

from memlib.config import override
from memlib.training.checkpoint import latest_checkpoint
from memlib.training.log import read_log
from memlib.training.trainer import Trainer
from tests.training.parallel.resharding import config_of, write_text_of
from tests.training.parallel.shards import same, tensors

STEPS_PER_LIFE, WORLD = 3, 2
TIMES = ("cpu_seconds", "tokens_per_second", "mfu")  # other in every run


def train(rank: int, folder: str, name: str, steps: int, background: bool, life: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{name}-{life}", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    changes = {
        "training.max_steps": steps,
        "training.save_steps": 1,
        "training.keep_checkpoints": 2,
        "training.async_save": background,
    }
    config = override(config_of(Path(folder), "dropout", "2"), changes)
    Trainer(config, Path(folder, name), resume=True).train(progress=False)
    dist.destroy_process_group()


def start(folder: Path, name: str, steps: int, background: bool = False, life: int = 0):
    arguments = (str(folder), name, steps, background, life)
    return multiprocessing.start_processes(train, arguments, WORLD, join=False, start_method="fork")


def reached(run: Path) -> int:
    """The step of the newest complete checkpoint."""
    newest = latest_checkpoint(run)
    return int(newest.name.removeprefix("step-")) if newest else 0


def live_and_kill(folder: Path, life: int, steps: int, draw: random.Random) -> bool:
    """One life of the run, to some step and a little further; returns whether a save was half done."""
    run, begin = folder / "killed", time.monotonic()
    processes = start(folder, "killed", steps, background=life % 2 == 1, life=life).processes
    goal = STEPS_PER_LIFE * life + draw.randrange(STEPS_PER_LIFE - 1)
    while reached(run) < goal:
        assert time.monotonic() - begin < 120 and all(p.is_alive() for p in processes), "did not go on"
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.25))
    assert any(p.is_alive() for p in processes), "ended before it was killed"
    for process in draw.sample(processes, draw.choice([1, WORLD])):
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:  # one that is alone fails at its next message
        process.join(60)
        assert process.exitcode, "a process did not end without the other"
    return any(run.glob("checkpoints/.step-*.part"))


def main(folder: Path, kills: int, seed: int) -> dict[str, object]:
    draw, steps = random.Random(seed), STEPS_PER_LIFE * (kills + 1)
    write_text_of(folder)
    start(folder, "straight", steps).join(120)
    half_done = [live_and_kill(folder, life, steps, draw) for life in range(kills)]
    last = start(folder, "killed", steps, life=kills)
    while not last.join():
        pass
    straight, killed = folder / "straight", folder / "killed"
    records = [
        [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(run)]
        for run in (straight, killed)
    ]
    pair = (tensors(latest_checkpoint(run)) for run in (straight, killed))
    return {
        "kills": kills,
        "during a save": sum(half_done),
        "steps": steps,
        "tensors that differ": same(*pair),
        "log is the same": records[0] == records[1] and len(records[0]) >= steps,
    }


if __name__ == "__main__":
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), seed)))
