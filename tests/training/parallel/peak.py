"""Estimate the memory of a rank, then train on two real processes and measure it; write both down.

The measure is independent of the estimate: torch.profiler reports every block that the CPU allocator gives
and takes back, from before the model is built.

Run by test_plan.py: python -m tests.training.parallel.peak FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from memlib.config import Config, load_config, override
from memlib.training.parallel.plan import make_plan
from memlib.training.trainer import Trainer

FSDP = {"distributed_strategy": "fsdp"}
LAYOUTS = {
    "fsdp": ({}, FSDP),
    "fsdp, resharded, checkpointing, bf16": (
        {"gradient_checkpointing": True},
        FSDP | {"reshard_after_forward": True, "mixed_precision": "bf16"},
    ),
    "ddp": ({}, {}),
}
CASES = (
    ("recall_baseline", "fsdp"),
    ("recall_baseline", "ddp"),
    ("recall_internal", "fsdp, resharded, checkpointing, bf16"),
    ("recall_hds", "fsdp"),
)
SIZES = {
    "model.hidden_dim": 128,
    "model.intermediate_dim": 512,
    "training.batch_size": 8,
    "training.gradient_accumulation_steps": 2,
}


def cases() -> dict[str, Config]:
    found = {}
    for name, layout in CASES:
        training, parallel = LAYOUTS[layout]
        changes = {f"training.{key}": value for key, value in training.items()}
        changes |= {f"parallel.{key}": value for key, value in parallel.items()}
        found[f"{name}: {layout}"] = override(load_config(name), SIZES | changes)
    return found


def real_peak(config: Config) -> int:
    """Most bytes that the allocator has given out in the second of two steps.

    Left out are blocks that gloo takes for itself inside a collective and gives back in another thread, which
    the profiler does not see (NCCL takes none of them). With them, what is held would grow at each step.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(config)
        trainer.train_step()
        with record_function("second step"):
            trainer.train_step()
    blocks: list[tuple[int, int, int]] = []  # time, address, bytes
    began = 0

    def walk(event: Any, inside: bool) -> None:
        nonlocal began
        inside = inside or event.name.startswith(("c10d::", "gloo:"))
        if event.name == "second step":
            began = event.start_time_ns
        if event.typed[0] == _EventType.Allocation and not (inside and event.typed[1].alloc_size > 0):
            blocks.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
        for child in event.children:
            walk(child, inside)

    for event in profiler.profiler.kineto_results.experimental_event_tree():
        walk(event, False)
    live: dict[int, int] = {}  # by address
    held = highest = 0
    for time, address, size in sorted(blocks, key=lambda block: block[0]):
        held -= live.pop(address, 0)  # taken back, or taken back unseen and given out again
        if size > 0:
            live[address] = size
            held += size
        highest = max(highest, held if time >= began else 0)
    return highest


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    planned = {name: make_plan(config, 2) for name, config in cases().items()} if rank == 0 else {}
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    found = {name: real_peak(config) for name, config in cases().items()}
    if rank == 0:
        pairs = {name: [planned[name].peak, peak] for name, peak in found.items()}
        Path(folder, "peaks.json").write_text(json.dumps(pairs), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(one_process, (sys.argv[1],), 2, start_method="fork")
