"""What reading k of 16 chapters costs: processor time and bytes, as parts of reading all, in one run."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memlib.config import ChaptersMemoryConfig
from memlib.memory import ChapterMemory

TOKENS, CHAPTERS, DIM = 4096, 16, 256


class Allocations(TorchDispatchMode):
    """Bytes of everything that operators return, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.nbytes += x.untyped_storage().nbytes()
        return result


@torch.no_grad()
def cost(top_k: int, rows: int, strategy: str = "sequence", n: int = 64) -> tuple[float, int]:
    """Processor seconds (least of several) and bytes of a read of `rows` streams that choose apart."""
    torch.manual_seed(0)
    config = ChaptersMemoryConfig(
        num_memory_tokens=TOKENS,
        num_chapters=CHAPTERS,
        top_k_chapters=top_k,
        routing_strategy_inference=strategy,
    )
    memory = ChapterMemory(config, DIM).eval()
    everything = torch.ones(rows, n, dtype=torch.bool)
    state = memory.write(torch.randn(rows, n, DIM), memory.init_state(rows), everything)
    hidden = torch.randn(rows, n, DIM)
    with Allocations() as allocated:
        memory.read(hidden, state)
    seconds = []
    for _ in range(9):
        start = time.process_time()
        memory.read(hidden, state)
        seconds.append(time.process_time() - start)
    return min(seconds), allocated.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "rows", "n"), [("sequence", 1, 64), ("sequence", 8, 64), ("token", 1, 1)]
)
def test_cost_falls_with_k(strategy, rows, n):
    """One stream, eight streams, and one token of a stream as generation reads it."""
    measured = {k: cost(k, rows, strategy, n) for k in (1, 4, CHAPTERS)}
    whole_time, whole_bytes = measured[CHAPTERS]
    for k, (seconds, nbytes) in measured.items():
        print(
            f"{strategy}, {rows} streams, {n} tokens, k = {k}: {1e3 * seconds:.2f} CPU-ms "
            f"({seconds / whole_time:.2f}), {nbytes / 2**20:.2f} MiB ({nbytes / whole_bytes:.2f})"
        )
    for k in (1, 4):
        assert measured[k][1] < (0.2 if k == 1 else 0.55) * whole_bytes
    assert measured[1][0] < measured[4][0] < whole_time
