"""Mixed precision on two processes: what stays float32, what an overflow does, how far it is from float32.

Run by test_precision.py: python -m tests.training.parallel.mixed FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from memlib.config import load_config, override
from memlib.nn.mlp import MLP
from memlib.training.parallel.ranks import local
from memlib.training.trainer import Trainer, TrainingDiverged

LAYOUTS = {
    "ddp": {},
    "fsdp": {"parallel.distributed_strategy": "fsdp"},
    "tensor": {"parallel.tensor_parallel_size": 2},
    "1f1b": {"parallel.pipeline_parallel_size": 2},
}
SMALL = {
    "model.hidden_dim": 32,
    "model.intermediate_dim": 64,
    "training.max_steps": 100,
    "training.batch_size": 8,
}


def run(changes: dict[str, object], overflow_at: int | None = None, steps: int = 4) -> list[dict[str, float]]:
    """A few steps; at `overflow_at` the last process's gradients overflow."""
    trainer = Trainer(override(load_config("recall_internal"), SMALL | changes))
    records = []
    for step in range(steps):
        if step == overflow_at and dist.get_rank() == dist.get_world_size() - 1:
            last = [module for module in trainer.model.modules() if isinstance(module, MLP)][-1]
            hook = last.register_forward_hook(lambda mlp, given, output: output * torch.inf)
        before = [local(p.detach()).clone() for p in trainer.model.parameters()]
        records.append(trainer.train_step())
        trainer.step += 1
        if step == overflow_at:
            after = [local(p.detach()) for p in trainer.model.parameters()]
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            records[-1]["unchanged"] = all(same)
            if dist.get_rank() == dist.get_world_size() - 1:
                hook.remove()
    return records


def diverged(changes: dict[str, object]) -> str:
    """What this process says where only the last one's rows give no number, in the second step."""
    trainer = Trainer(override(load_config("recall_internal"), SMALL | changes))
    trainer.train_step()
    trainer.step += 1
    if dist.get_rank() == dist.get_world_size() - 1:
        first = next(module for module in trainer.model.modules() if isinstance(module, MLP))
        first.register_forward_hook(lambda mlp, given, output: output * torch.nan)
    try:
        trainer.train_step()
    except TrainingDiverged as error:
        return str(error)
    return "went on"


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    results: dict[str, object] = {"none": run({})}
    for precision in ("bf16", "fp16"):
        for layout, changes in LAYOUTS.items():
            results[f"{precision} {layout}"] = run(changes | {"parallel.mixed_precision": precision})
    for layout, changes in LAYOUTS.items():
        everyone: list[object] = [None, None]
        found = run(changes | {"parallel.mixed_precision": "fp16"}, overflow_at=1)
        dist.all_gather_object(everyone, found)
        results[f"overflow {layout}"] = everyone
    for layout in ("ddp", "fsdp"):
        messages: list[object] = [None, None]
        dist.all_gather_object(messages, diverged(LAYOUTS[layout]))
        results[f"diverged {layout}"] = messages
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that torch is imported once.
    multiprocessing.start_processes(one_process, (sys.argv[1],), 2, start_method="fork")
