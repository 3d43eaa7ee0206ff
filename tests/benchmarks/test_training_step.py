"""What a memory costs in training: tokens per second of a step, in turns, in one run.

A step is forward, backward and AdamW on 4 streams of 1024 tokens, four segments of 256, from an empty state.
All models have hidden_dim 128 and 4 layers. The memory is in the first layer, as in the shipped
configurations, and the feed-forward is narrower, so that all have 1.0M parameters within 1 %.

    OMP_NUM_THREADS=1 python tests/benchmarks/test_training_step.py [architecture …]
    OMP_NUM_THREADS=1 python tests/benchmarks/test_training_step.py --before PATH [architecture …]

PATH is another checkout of the project, for example of an earlier commit. Each checkout is measured by a
process of its own. They take turns step by step, and only one computes at a time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from memlib.config import Config, from_dict
from memlib.models import MemoryTransformer
from memlib.training.optimizer import make_optimizer

HERE = Path(__file__).resolve().parents[2]
BATCH, TOKENS = 4, 1024
MODEL = {"hidden_dim": 128, "num_heads": 4, "num_layers": 4, "vocab_size": 256, "segment_length": 256}
INTERNAL = {"num_slots": 256, "num_heads": 4}
EXTERNAL = {"num_heads": 4, "capacity": 1024, "top_k": 32}
HDS = {
    "num_memories": 4,
    "num_slots": 128,
    "mem_dim": 64,
    "address_dim": 16,
    "chunk_size": 16,
    "num_blocks": 8,
    "half_life_min": 4.0,
    "half_life_max": 64.0,
}
# Width of the feed-forward, and the memory.
ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (448, {}),
    "internal": (400, {"internal": INTERNAL}),
    "hds": (368, {"hds": HDS}),
    "ltm": (440, {"ltm": {"num_slots": 512, "slot_dim": 64}}),
    "ring": (440, {"ring": {"short_slots": 256, "long_slots": 512, "slot_dim": 64}}),
    "external": (416, {"external": EXTERNAL}),
    "hybrid": (368, {"internal": INTERNAL, "external": EXTERNAL | {"retrieval_gate": "query"}}),
    "chapters": (384, {"chapters": {"num_memory_tokens": 256, "num_chapters": 8, "top_k_chapters": 2}}),
}
# Tokens per second as a part of the plain model's. Measured 0.88, 0.84, 0.83 and 0.75; a busy machine moves
# them by a tenth, so only what is lower than these is certainly slower.
LEAST = {"internal": 0.75, "hds": 0.7, "ltm": 0.7, "external": 0.6}


def config_of(architecture: str) -> Config:
    """The configuration that is measured, from which other benchmarks may start."""
    width, memories = ARCHITECTURES[architecture]
    memory = {"kinds": list(memories), "memory_layer_placement": "first_k", "memory_layer_k": 1} | memories
    return from_dict(Config, {"model": MODEL | {"intermediate_dim": width}, "memory": memory})


def training_step(architecture: str) -> Callable[[], None]:
    """A function that makes one step on the same batch each time."""
    torch.manual_seed(0)
    config = config_of(architecture)
    model = MemoryTransformer(config)
    optimizer = make_optimizer(model, config.training)
    ids = torch.randint(0, config.model.vocab_size, (BATCH, TOKENS))

    def step() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def serve() -> None:
    """Make a step of each architecture named on standard input, and answer with its processor seconds."""
    steps: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in steps:
            steps[name] = training_step(name)
        start = time.process_time()
        steps[name]()
        print(time.process_time() - start, flush=True)


def measure(architectures: Sequence[str], repeats: int, checkouts: Sequence[Path] = (HERE,)) -> list[dict]:
    """For each checkout, the processor seconds of every step of each architecture, all in turns."""
    workers = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            cwd=path,
            env=os.environ | {"PYTHONPATH": f"{path}:{path}/kernels", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in checkouts
    ]
    spent: list[dict[str, list[float]]] = [{name: [] for name in architectures} for _ in workers]
    for turn in range(repeats + 2):  # two turns to warm up
        for name in architectures:
            for worker, times in zip(workers, spent, strict=True):
                assert worker.stdin is not None and worker.stdout is not None
                print(name, file=worker.stdin, flush=True)
                seconds = float(worker.stdout.readline())
                if turn > 1:
                    times[name].append(seconds)
    for worker in workers:
        worker.communicate()
    return spent


def report(spent: list[dict[str, list[float]]]) -> dict[str, float]:
    """Print tokens per second of this checkout and, if measured, of the one before; return the parts of the
    plain model's rate."""
    medians = [{name: statistics.median(times) for name, times in each.items()} for each in spent]
    for name in medians[0]:
        line = f"{name:10}"
        for label, seconds in zip(("now", "before"), medians, strict=False):
            rate, part = BATCH * TOKENS / seconds[name], seconds["plain"] / seconds[name]
            line += f"{label:>8} {rate:7.0f} tokens/s {part:5.2f} of plain"
        if len(spent) > 1:
            ratios = [b / a for a, b in zip(spent[0][name], spent[1][name], strict=True)]
            line += f"   now/before {statistics.median(ratios):5.2f}"
        print(line)
    return {name: medians[0]["plain"] / seconds for name, seconds in medians[0].items()}


def test_the_models_that_are_compared_have_equal_sizes():
    sizes = {name: MemoryTransformer(config_of(name)) for name in ARCHITECTURES}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in sizes.items()}
    for name, count in counts.items():
        assert abs(count / counts["plain"] - 1) < 0.01, f"{name}: {count}, plain: {counts['plain']}"


@pytest.mark.slow
def test_a_training_step_costs_little_more_than_the_plain_model():
    print()
    ratio = report(measure(list(ARCHITECTURES), 5))
    for name, least in LEAST.items():
        assert ratio[name] >= least, f"{name}: {ratio[name]:.2f} of the plain model's tokens/s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--serve", action="store_true", help="what a worker process does")
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
    else:
        paths = [HERE] if arguments.before is None else [HERE, arguments.before.resolve()]
        names = ["plain", *(arguments.architectures or list(ARCHITECTURES)[1:])]
        report(measure(names, arguments.repeats, paths))
