"""Train the same models on one process and in every layout of several, and write down the differences.

Run by test_layouts.py: python -m tests.training.parallel.layouts WORLD FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing

from memlib.config import ConfigError, override
from memlib.memory import MEMORIES
from memlib.models import MemoryTransformer
from memlib.tasks import Batch, Task
from memlib.training import trainer as training
from tests.laws.cases import BASELINE, SEGMENT, VOCAB, Case, cases, stir

ROWS, STEPS = 4, 2
FSDP = {"distributed_strategy": "fsdp"}
TENSOR = {"tensor_parallel_size": 2}
EXPERTS = {"expert_parallel": True}
STAGES = {"pipeline_parallel_size": 2, "pipeline_microbatches": 2}
LAYOUTS = {
    2: {
        "ddp": {},
        "fsdp": FSDP,
        "fsdp, resharded": FSDP | {"reshard_after_forward": True},
        "tensor": TENSOR,
        "tensor, sequence, loss": TENSOR | {"sequence_parallel": True, "loss_parallel": True},
        "1f1b": STAGES,
        "ddp, experts": EXPERTS,
        "fsdp, experts": FSDP | EXPERTS | {"reshard_after_forward": True},
    },
    4: {
        "hsdp": {"distributed_strategy": "hsdp", "shard_size": 2},
        "fsdp x tensor": FSDP | TENSOR | {"sequence_parallel": True, "loss_parallel": True},
        "fsdp x 1f1b": FSDP | STAGES,
        "tensor x gpipe": TENSOR | STAGES | {"pipeline_schedule": "gpipe"},
        "hsdp, experts": {"distributed_strategy": "hsdp", "shard_size": 2} | EXPERTS,
        "fsdp x tensor, experts": FSDP | TENSOR | {"sequence_parallel": True} | EXPERTS,
        "interleaved x fsdp": FSDP | STAGES | {"pipeline_schedule": "interleaved"},
    },
    8: {"fsdp x tensor x 1f1b": FSDP | TENSOR | STAGES},
}
FEW = {4: ("baseline", "internal", "chapters", "chapters, token"), 8: ("internal",)}  # of the cases
EXPERT_CASES = ("chapters", "chapters, token", "internal")


class Uneven(Task):
    """Random tokens; a row's share of scored positions differs from row to row, and some rows have none.

    documents: some begin inside a row, and some segments end with padding.
    """

    chance, continues, documents = 0.0, True, False

    def batch(self, batch_size: int, step: int, seed: int = 0, split: str = "train") -> Batch:
        rng = np.random.default_rng([seed, step, split == "test"])
        segments = 3 if split == "test" else 2 + step % 2
        stream = rng.integers(VOCAB, size=(batch_size, segments * SEGMENT + 1))
        share = np.arange(batch_size)[:, None] / batch_size
        scored = rng.random((batch_size, segments * SEGMENT)) < (share if split == "train" else 0.5)
        batch = Batch.of(stream, scored, rng.random(batch_size) < 0.3)
        if self.documents and split == "train":
            real = np.arange(SEGMENT) < rng.integers(1, SEGMENT + 1, (batch_size, segments, 1))
            mask = torch.from_numpy(real.reshape(batch_size, -1))
            fresh = torch.from_numpy(rng.random((batch_size, segments)) < 0.3)
            batch = replace(batch, scored=batch.scored & mask, mask=mask, fresh=fresh)
        return batch

    def solve(self, row: list[int]) -> list[int]:
        return row


class Trainer(training.Trainer):
    def make_task(self, config):
        task = Uneven(SEGMENT, 3)
        task.documents = self.config.training.horizon == 1
        return task


def chosen() -> dict[str, Case]:
    """The baseline; the first variant of each memory; two with a shared state; both residual fusions."""
    found = {case.name: case for case in cases()}
    names = {
        kind: next(n for n in found if n.startswith(kind) and n.endswith("per_layer")) for kind in MEMORIES
    }
    names |= {f"{kind}, shared": next(n for n in found if n.startswith(kind) and n.endswith("-shared"))
              for kind in ("internal", "hds")}  # fmt: skip
    names |= {f"ltm, {variant}": next(n for n in found if n.startswith("ltm") and n.endswith(variant))
              for variant in ("residual_A", "residual_B")}  # fmt: skip
    names["external, joint"] = next(
        n for n in found if n.startswith("external-joint") and n.endswith("query-per_layer")
    )
    names["window"] = "baseline-window"
    # One selection per token in evaluation; tokens in full rank, which layers share.
    wide = {"use_low_rank_memory": False, "memory_dim": None, "top_k_chapters": 1}
    token = found[next(n for n in found if n.startswith("chapters") and "token" in n)]
    token = replace(
        token, memory={"memory_sharing": "shared"}, kinds={"chapters": token.kinds["chapters"] | wide}
    )
    chosen_cases = {"baseline": BASELINE} | {name: found[full] for name, full in names.items()}
    return chosen_cases | {"chapters, token": token}


def curve(case: Case, changes: dict[str, object], options: dict[str, object]) -> list[list[float]]:
    """Loss, accuracy, gradient norm and routers' loss of each step, and at last test loss and accuracy."""
    options = (
        options
        | {
            "model.vocab_size": VOCAB + 1,  # even, to be divided by two
            "training.batch_size": ROWS,
            "training.gradient_accumulation_steps": 2,
            "training.warmup_steps": 0,
            "training.max_grad_norm": 1.0,
            "training.weight_decay": 0.1,
            "training.eval_examples": 8,
        }
        | {f"training.{name}_lr": 0.01 for name in ("base_model", "memory", "gate")}
    )
    # All losses that need the whole batch, large enough to be seen.
    if "chapters" in case.kinds:
        options |= {"memory.chapters.load_balance_coefficient": 0.5}
        for loss in ("auxiliary_loss", "z_loss"):
            options |= {
                f"memory.chapters.use_{loss}": True,
                f"memory.chapters.{loss}_coefficient": 0.5,
            }
    if case.kinds.get("external", {}).get("retrieval_gate") == "query":
        options["memory.external.retrieval_cost"] = 0.5
    if case is not BASELINE and "memory_layer_custom" not in case.memory:
        options["memory.memory_layer_placement"] = "all"
    config = override(case.config(), options | {f"parallel.{k}": v for k, v in changes.items()})
    trainer = Trainer(config)
    found = []
    for _ in range(STEPS):
        record = trainer.train_step()
        trainer.step += 1
        found.append(
            [record["loss"], record["accuracy"], record["grad_norm"], record.get("router_loss", 0.0)]
        )
    score = trainer.evaluate()
    return [*found, [score.loss, score.accuracy, 0.0, 0.0]]


def one_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    training.MemoryTransformer = lambda config: stir(MemoryTransformer(config))
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results: dict[str, object] = {}
    for name, case in chosen().items():
        if name not in FEW.get(world, (name,)):
            continue
        for layout, changes in LAYOUTS[world].items():
            options = {
                "training.horizon": {"fsdp": 1, "tensor x gpipe": 2}.get(layout),
                "model.num_layers": 4 if "interleaved" in layout else max(2, case.layers),
                "model.dropout": 0.2 if layout in ("ddp", "1f1b", "fsdp x 1f1b", "tensor x gpipe") else 0.0,
            }
            if changes.get("expert_parallel") and name not in EXPERT_CASES:
                continue
            try:
                got = curve(case, changes, options)
            except ConfigError as refused:
                results[f"{name}: {layout}"] = str(refused)
                continue
            results[f"{name}: {layout}"] = {"got": got, "case": name, "options": options}
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def compare(folder: str) -> None:
    """Add to each result its largest difference from one process."""
    torch.set_default_dtype(torch.float64)
    training.MemoryTransformer = lambda config: stir(MemoryTransformer(config))
    results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    alone: dict[object, object] = {}
    for result in results.values():
        if isinstance(result, dict):
            key = result["case"], json.dumps(result["options"])
            if key not in alone:
                alone[key] = curve(chosen()[key[0]], {}, result["options"])
            result["gap"] = float(np.abs(np.array(result["got"]) - np.array(alone[key])).max())
    gaps = {name: result["gap"] if isinstance(result, dict) else result for name, result in results.items()}
    Path(folder, "gaps.json").write_text(json.dumps(gaps), encoding="utf-8")


if __name__ == "__main__":
    # Forked, so that torch is imported once.
    world, folder = int(sys.argv[1]), sys.argv[2]
    multiprocessing.start_processes(one_process, (world, folder), world, start_method="fork")
    compare(folder)
