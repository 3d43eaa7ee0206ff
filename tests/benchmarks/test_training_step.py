"""What a memory costs in training: processor time of a step, relative to the plain model, in one run.

A step is forward, backward and AdamW on 4 streams of 1024 tokens, four segments of 256, from an empty state.
All models have hidden_dim 128, 4 layers, and the memory in every layer; the plain one has 0.92M parameters.

| architecture | sizes | parameters |
| --- | --- | --- |
| internal | 64 slots of 128, 4 address books | 1.19M |
| hds | 4 banks of 64 slots of 64 | 1.52M |
| ltm | 512 slots of 64, the defaults | 0.97M |
| external | capacity 1024, 32 hits for each query and head | 1.12M |

Run it alone: `OMP_NUM_THREADS=1 python tests/benchmarks/test_training_step.py [architecture …]`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memlib.config import Config, from_dict
from memlib.models import MemoryTransformer
from memlib.training.optimizer import make_optimizer

BATCH, TOKENS = 4, 1024
MODEL = {
    "hidden_dim": 128,
    "num_heads": 4,
    "num_layers": 4,
    "intermediate_dim": 384,
    "vocab_size": 256,
    "segment_length": 256,
}
MEMORIES: dict[str, dict[str, Any]] = {
    "plain": {"kinds": []},
    "internal": {"kinds": ["internal"]},
    "hds": {"kinds": ["hds"], "hds": {"num_memories": 4, "num_slots": 64, "mem_dim": 64}},
    "ltm": {"kinds": ["ltm"]},
    "external": {"kinds": ["external"], "external": {"capacity": 1024, "top_k": 32}},
}
# Tokens per second as a part of the plain model's: below this, something has become slower.
LEAST = {"internal": 0.5, "hds": 0.4, "ltm": 0.3, "external": 0.18}


def config_of(architecture: str) -> Config:
    """The configuration that is measured, from which other benchmarks may start."""
    return from_dict(Config, {"model": MODEL, "memory": MEMORIES[architecture]})


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


def measure(architectures: list[str], repeats: int) -> dict[str, float]:
    """Median processor seconds of a step of each architecture, in turns."""
    steps = {name: training_step(name) for name in architectures}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def report(seconds: dict[str, float]) -> dict[str, float]:
    """Print tokens per second; return them as parts of the first architecture's."""
    plain = next(iter(seconds.values()))
    for name, value in seconds.items():
        rate = BATCH * TOKENS / value
        print(
            f"{name:10} {1e3 * value:7.0f} CPU-ms a step {rate:8.0f} tokens/s, {plain / value:.2f} of plain"
        )
    return {name: plain / value for name, value in seconds.items()}


@pytest.mark.slow
def test_a_training_step_costs_little_more_than_the_plain_model():
    print()
    ratio = report(measure(list(MEMORIES), 5))
    for name, least in LEAST.items():
        assert ratio[name] >= least, f"{name}: {ratio[name]:.2f} of the plain model's tokens/s"


if __name__ == "__main__":
    report(measure(["plain", *(sys.argv[1:] or list(MEMORIES)[1:])], 7))
