"""What goes wrong in training on several processes: one faulty variant for each, which must be found.

Run by test_mutants.py: python -m tests.training.parallel.mutants FOLDER

Each variant replaces one piece of the code on both of two processes and trains; the result must then not be
that of one process, to which the right code is equal within 1e-9 (layouts.py).
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from memlib.models import MemoryTransformer
from memlib.nn.noise import Noise
from memlib.training import trainer as training
from memlib.training.parallel import apply, experts, pipeline
from memlib.training.parallel.ranks import Ranks, local
from tests.laws.cases import stir
from tests.training.parallel import layouts
from tests.training.parallel.layouts import LAYOUTS, chosen, compare, curve


def clips_by_its_own_norm(parameters, limit, ranks):
    gradients = [local(p.grad) for p in parameters]
    norm = float(nn.utils.get_total_norm(gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


class DividesByItsOwnPositions(layouts.Trainer):
    """A mean over this rank's scored tokens, then the mean over ranks: tokens of short rows weigh more."""

    def backward(self, batch, task, positions, number=0):
        mine = int(batch.scored[self.ranks.rows(len(batch.starts))].sum())
        return super().backward(batch, task, max(1, mine * self.ranks.data_size * 2), number)


def keyed_by_the_ranks_own_rows(seed, batch, start, rows, right=Noise.of):
    return right(seed, batch, start, rows - rows[0])


def first_rows(ranks, batch_size):
    """Every rank reads the same rows."""
    return slice(0, batch_size // ranks.data_size)


def counted(stage, stream, rows, ids, keys=None, right=pipeline.Stage.forward):
    """A stage that takes its calls for microbatches, though one more finds out shapes."""
    stage.calls = getattr(stage, "calls", -1) + 1
    return right(stage, stream, (rows + stage.calls) % len(rows), ids, keys)


def forgets_the_logsumexp(memory, counts, queries, right=experts.attend_own):
    """Chapters are merged by the router's weights alone, however well their tokens match."""
    results = right(memory, counts, queries)
    return torch.cat((results[..., :-1], torch.zeros_like(results[..., -1:])), -1)


def keeps_its_gradients(ctx, gradient):
    """Gradients of queries and results do not return to the rank that they came from."""
    return gradient.new_zeros(sum(ctx.splits[0]), *gradient.shape[1:]), None, None, None


# name: case, layout, dropout, horizon, what is replaced by what
MUTANTS = {
    "each rank clips by its own norm": (
        "internal", "fsdp", 0.0, None, [(training, "clip", clips_by_its_own_norm)]),
    "missing gradients stay missing": (
        "internal", "fsdp", 0.0, 1, [(training, "fill_missing", lambda parameters: None)]),
    "each rank divides by its own tokens": (
        "baseline", "fsdp", 0.0, None,
        [(layouts, "Trainer", DividesByItsOwnPositions)]),
    "router statistics of own rows": (
        "chapters", "fsdp", 0.0, None, [(apply.SumOverRows, "__call__", lambda self, total: total)]),
    "dropout by the place in a rank": (
        "baseline", "ddp", 0.2, None, [(Noise, "of", keyed_by_the_ranks_own_rows)]),
    "all ranks read the same rows": ("baseline", "ddp", 0.0, None, [(Ranks, "rows", first_rows)]),
    "gradients of data ranks are not summed": (
        "baseline", "ddp", 0.0, None, [(apply, "shard", lambda *arguments: None)]),
    "owners leave the log-sum-exp out": (
        "chapters", "ddp, experts", 0.0, None, [(experts, "attend_own", forgets_the_logsumexp)]),
    "gradients do not travel back to other ranks": (
        "chapters", "ddp, experts", 0.0, None,
        [(experts._Exchange, "backward", staticmethod(keeps_its_gradients))]),
    "owners sum what the others average": (
        "chapters", "ddp, experts", 0.0, None, [(experts, "averaged", lambda size, gradient: gradient)]),
    "a stage counts its calls": ("internal", "1f1b", 0.0, None, [(pipeline.Stage, "forward", counted)]),
}  # fmt: skip


def types_inside(cast: bool) -> list[str]:
    """The types of the states that a memory sees in bf16, if inputs of blocks are cast or not."""
    seen = set()

    def note(memory, given):
        for state in given[0].states:
            seen.update(str(t.dtype) for _, t in state.named_tensors() if t.is_floating_point())

    def policy(**options):
        return MixedPrecisionPolicy(**options | {"cast_forward_inputs": cast})

    with patch.object(apply, "MixedPrecisionPolicy", policy):
        case = chosen()["internal"]
        config = case.config()
        config.parallel.mixed_precision = "bf16"
        config.parallel.distributed_strategy = "fsdp"
        config.training.batch_size = 2
        ranks = training.join(config)
        model = apply.distribute(MemoryTransformer(config).float(), config.parallel, ranks)
        for block in model.blocks:
            block.register_forward_pre_hook(
                lambda module, given: note(module, [given[4]]) if given[4] is not None else None
            )
        model(torch.zeros(1, 8, dtype=torch.int64))
    return sorted(seen)


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    training.MemoryTransformer = lambda config: stir(MemoryTransformer(config))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    results: dict[str, object] = {}
    for name, (case, layout, dropout, horizon, faults) in MUTANTS.items():
        options = {"model.num_layers": 2, "model.dropout": dropout, "training.horizon": horizon}
        with ExitStack() as stack:
            for owner, attribute, fault in faults:
                stack.enter_context(patch.object(owner, attribute, fault))
            got = curve(chosen()[case], LAYOUTS[2][layout], options)
        results[name] = {"got": got, "case": case, "options": options}
    torch.set_default_dtype(torch.float32)
    results["state, right"], results["state, inputs cast"] = (
        str(types_inside(cast)) for cast in (False, True)
    )
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(one_process, (sys.argv[1],), 2, start_method="fork")
    compare(sys.argv[1])
