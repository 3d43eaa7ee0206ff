"""Train chapters on two processes with and without expert parallelism; write down bytes, messages, gradients.

    python -m tests.training.parallel.experts docs/results/experts.json

Counted on each process: bytes of the banks' tokens and of their optimizer state, and the collectives of one
step, with the bytes that this process puts into them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memlib.config import Config, override
from memlib.models import MemoryTransformer
from memlib.training import trainer as training
from memlib.training.parallel.allocations import local_bytes
from tests.laws.cases import stir

WORLD = 2
LAYOUTS: dict[str, dict[str, object]] = {
    "ddp": {},
    "ddp, experts": {"expert_parallel": True},
    "fsdp": {"distributed_strategy": "fsdp", "reshard_after_forward": True},
    "fsdp, experts": {
        "distributed_strategy": "fsdp",
        "reshard_after_forward": True,
        "expert_parallel": True,
    },
}
SIZES: dict[str, object] = {
    "model.hidden_dim": 64,
    "model.num_heads": 4,
    "model.num_layers": 2,
    "model.intermediate_dim": 128,
    "model.vocab_size": 64,
    "model.segment_length": 32,
    "memory.kinds": ["chapters"],
    "memory.memory_layer_placement": "all",
    "memory.chapters.num_memory_tokens": 4096,
    "memory.chapters.num_chapters": 64,
    "memory.chapters.top_k_chapters": 4,
    "task.name": "recall",
    "task.segments": 2,
    "training.batch_size": 8,
    "training.warmup_steps": 0,
    "training.seed": 0,
}


class Messages(TorchDispatchMode):
    """Counts collectives, and the bytes of what this process sends in them."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = dict[str, int](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removesuffix("_").split(".")[0]
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            name = name.split("::")[1].strip("_")
            self.count[name] = self.count.get(name, 0) + 1
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            own = tensors[-1:] if "all_to_all" in name or "base" in name else tensors[:1]
            self.bytes += sum(t.numel() * t.element_size() for t in own)
        return func(*args, **(kwargs or {}))


def train(changes: dict[str, object]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One step, counted; and the gradients of its optimizer's first moments."""
    parallel = {f"parallel.{name}": value for name, value in changes.items()}
    trainer = training.Trainer(override(Config(), SIZES | parallel))
    with Messages() as messages:
        trainer.train_step()
    moments = {}
    for name, p in trainer.model.named_parameters():
        moment = trainer.optimizer.state[p]["exp_avg"]
        moments[name] = moment.full_tensor() if isinstance(moment, DTensor) else moment
    tokens = [p for name, p in trainer.model.named_parameters() if ".bank." in name]
    counted = {
        "token_bytes": local_bytes(tokens),
        "optimizer_bytes": 2 * local_bytes(tokens),
        "messages": messages.count,
        "sent_bytes": messages.bytes,
    }
    return counted, moments


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value; the chapters' tokens have one above zero."""
    return float((got - want).abs().max() / want.abs().max())


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    training.MemoryTransformer = lambda config: stir(MemoryTransformer(config))  # type: ignore[assignment]
    _, alone = train({})  # before the processes know each other
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD
    )
    results = {}
    for name, changes in LAYOUTS.items():
        counted, moments = train(changes)
        gaps = [relative(moments[key], moment) for key, moment in alone.items()]
        results[name] = counted | {"gradient_gap": max(gaps)}
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def measure() -> dict[str, Any]:
    """Results by layout, of the first of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(one_process, (folder,), WORLD, start_method="fork")
        found: dict[str, Any] = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    document = {"torch": torch.__version__, "processes": WORLD, "sizes": SIZES, "results": measure()}
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
