"""Two processes train adapters sharded by FSDP2 (branches, layers, base), and compare with one process.

Run by test_adapter_sharded.py: python -m tests.pretrained.sharded FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from tests.laws.cases import SEGMENT, VOCAB
from tests.pretrained.bases import adapter

WORLD, ROWS, STEPS, SEGMENTS = 2, 4, 3, 3

CASES = {
    "memory": (("internal", "external"), {}),
    "both": (("internal",), {"use_both_memory_and_lora": True}),
    "trained base": (("ltm",), {"freeze_base_model": False}),
    "segment": (("hds",), {"mode": "segment"}),
}


def loss_in_float64(logits, labels, vocab_size):
    """transformers' own loss rounds logits to float32, which would hide what is wrong."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def build(name):
    kinds, settings = CASES[name]
    model = adapter(kinds=kinds, **settings).train()
    model.base.loss_function = loss_in_float64
    return model


def steps(model, rows, horizon):
    """The losses of a few optimizer steps on some rows of the batch, clipped, with truncated gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCAB, (ROWS, SEGMENTS * SEGMENT), generator=generator)[rows]
        state, total = None, 0.0
        for piece in ids.split(horizon * SEGMENT, 1):
            output = model(piece, labels=piece, memory_state=state)
            state = output.memory_state.detach()
            output.loss.backward()
            total += float(output.loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    gaps = {}
    for name in CASES:
        for horizon in (SEGMENTS, 1):
            want = steps(build(name), slice(0, ROWS), horizon)
            model = build(name)
            for part in (*model.branches.values(), *model.base.model.layers, model.base):
                fully_shard(part, mesh=mesh)
            share = ROWS // WORLD
            got = torch.tensor(
                steps(model, slice(rank * share, (rank + 1) * share), horizon), dtype=torch.float64
            )
            dist.all_reduce(got)
            gap = (got / WORLD - torch.tensor(want, dtype=torch.float64)).abs().max()
            gaps[f"{name}, horizon {horizon}"] = float(gap)
    if rank == 0:
        Path(folder, "gaps.json").write_text(json.dumps(gaps), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(one_process, (sys.argv[1],), WORLD)
