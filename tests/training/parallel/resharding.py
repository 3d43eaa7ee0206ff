"""Runs of one, two and four processes that save, and every one of them continued by every number.

Run by test_checkpoint.py: python -m tests.training.parallel.resharding FOLDER

FOLDER/<case>/<layout> is a run of STEPS steps that saved at HALF; FOLDER/<case>/<saved>-<layout> continues
it from there. Layouts are named by their processes, and by what they divide if it is not the rows.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils.tensorboard import SummaryWriter  # noqa: F401, imported once, before the forks

from memlib.config import Config, override
from memlib.training.trainer import Trainer
from tests.training.conftest import TINY

HALF, STEPS = 2, 4
LAYOUTS: dict[str, dict[str, object]] = {
    "1": {},
    "2": {"parallel.distributed_strategy": "fsdp"},
    "2-tensor": {"parallel.tensor_parallel_size": 2},
    "2-stages": {"parallel.pipeline_parallel_size": 2, "parallel.pipeline_microbatches": 2},
    "2-experts": {"parallel.distributed_strategy": "fsdp", "parallel.expert_parallel": True},
    "4": {"parallel.distributed_strategy": "hsdp", "parallel.shard_size": 2},
}
PAIRS = {
    # With a horizon of one segment no gradient ever reaches what writes into the memory.
    "internal": [
        *itertools.product("124", repeat=2),
        *[("1", name) for name in ("2-tensor", "2-stages")],
        *[(name, "1") for name in ("2-tensor", "2-stages")],
        *[(name, name) for name in ("2-tensor", "2-stages")],
    ],
    "curriculum": [("2", "1"), ("1", "2")],
    "chapters": [("2-experts", "1"), ("1", "2-experts"), ("2-experts", "4"), ("2-experts", "2-experts")],
    "dropout": [("2", "2")],
    "async": [("2", "2")],
    "lanes": [("1", "2"), ("2", "1"), ("2", "2")],
}
CHANGES: dict[str, dict[str, object]] = {
    "internal": {"training.horizon": 1},
    "curriculum": {
        "memory.kinds": ["ring"],
        "training.base_model_lr": 1e-3,  # a hard choice of slots magnifies rounding at higher rates
        "training.memory_lr": 1e-3,
        "training.curriculum": [{"from_step": 3, "set": {"segments": 3}}],
    },
    "chapters": {
        "memory.kinds": ["chapters"],
        "memory.chapters.num_memory_tokens": 64,
        "training.gradient_checkpointing": True,
    },
    "dropout": {"model.dropout": 0.2},
    "async": {"training.async_save": True, "training.save_steps": 1},
    "lanes": {"task.text.documents": "lanes", "training.gradient_accumulation_steps": 2},
}


def config_of(folder: Path, case: str, layout: str) -> Config:
    """A tiny run on a text, whose memory is carried from step to step."""
    return override(
        Config(),
        TINY
        | {
            "task.name": "text",
            "task.segments": 2,
            "task.text.dataset": str(folder / ("files" if case == "lanes" else "verses.txt")),
            "model.vocab_size": 256,
            "model.hidden_dim": 32,
            "training.max_steps": STEPS,
            "training.save_steps": HALF,
            "training.keep_checkpoints": 10,
            "training.eval_steps": 100,
            "training.eval_examples": 4,
        }
        | CHANGES[case]
        | LAYOUTS[layout],
    )


def train_all(rank: int, world: int, folder: str, resume: bool) -> None:
    """Train every run of this number of processes, or continue the copies of others'."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{folder}/store-{world}-{resume}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for case, pairs in PAIRS.items():
        runs = pairs if resume else [(layout, layout) for layout in sorted({saved for saved, _ in pairs})]
        for saved, layout in runs:
            if int(layout[0]) == world:
                run = Path(folder, case, f"{saved}-{layout}" if resume else layout)
                Trainer(config_of(Path(folder), case, layout), run, resume).train(progress=False)
    if world > 1:
        dist.destroy_process_group()


def copy_halves(folder: Path) -> None:
    """Copies of all runs as they were after their first half."""
    for case, pairs in PAIRS.items():
        for saved, layout in pairs:
            step = Path("checkpoints", f"step-{HALF:07d}")
            shutil.copytree(folder / case / saved / step, folder / case / f"{saved}-{layout}" / step)


def write_text_of(folder: Path) -> None:
    """The text that all runs in a folder read, and the documents of those with lanes."""
    text = "".join(f"{i} green bottles, hanging on the wall. " for i in range(600))
    (folder / "verses.txt").write_text(text, encoding="utf-8")
    (folder / "files").mkdir()
    for i in range(24):
        (folder / "files" / f"{i:02}.txt").write_text(text[40 * i :][: 5 + 37 * i % 29], encoding="utf-8")


def main(folder: Path) -> None:
    write_text_of(folder)
    for resume in (False, True):
        for world in (1, 2, 4):  # forked, so that torch is imported once
            arguments = (world, str(folder), resume)
            multiprocessing.start_processes(train_all, arguments, world, start_method="fork")
        if not resume:
            copy_halves(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
