"""Two processes train one model sharded by FSDP2, block by block, and compare with one process.

Run by test_sharded.py: python -m tests.models.sharded FOLDER CASE …
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

from tests.laws.cases import SEGMENT, VOCAB, cases

WORLD, ROWS, STEPS, SEGMENTS = 2, 4, 3, 3


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


def one_process(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    by_name = {case.name: case for case in cases()}
    gaps = {}
    for name in names:
        for horizon in (SEGMENTS, 1):
            model = by_name[name].build().train()
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            share = ROWS // WORLD
            got = torch.tensor(
                steps(model, slice(rank * share, (rank + 1) * share), horizon), dtype=torch.float64
            )
            dist.all_reduce(got)
            if rank == 0:
                want = steps(by_name[name].build().train(), slice(0, ROWS), horizon)
                gap = (got / WORLD - torch.tensor(want, dtype=torch.float64)).abs().max()
                gaps[f"{name}, horizon {horizon}"] = float(gap)
    if rank == 0:
        Path(folder, "gaps.json").write_text(json.dumps(gaps), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that torch is imported once.
    multiprocessing.start_processes(one_process, (sys.argv[1], sys.argv[2:]), WORLD, start_method="fork")
