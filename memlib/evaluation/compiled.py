"""Speed of exported models beside the models themselves: tokens per second on one thread.

Both read the same random segments with an untrained model of a preset, and each carries its own memory
state. They take turns; the figures are medians of ROUNDS rounds, in processor time of one thread.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from memlib.config import Config, load_config
from memlib.evaluation.table import markdown
from memlib.inference.export import export_model, named
from memlib.models import MemoryTransformer

ROUNDS, SEGMENTS = 15, 4  # segments of a round
SETTINGS = (
    *((f"recall_{kind}", 1) for kind in ("baseline", "internal", "hds", "ltm", "external")),
    ("recall_internal", 8),
    ("base_small", 1),
    ("base_small", 8),
)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the model (`eager`) and of its package (`compiled`).

    compile_seconds: processor time of the export, compiler included; difference: the largest between the
    logits of both in the last segment.
    """

    name: str
    streams: int
    segment_length: int
    compile_seconds: float
    eager: float
    compiled: float
    difference: float


def measure_all(log: Callable[[str], None] = print) -> list[Speed]:
    """Measure every setting; some minutes, most of them for the compiler."""
    results, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, streams in SETTINGS:
            results.append(measure(load_config(name), name, streams))
            log(f"{name}, batch of {streams}: {results[-1].compiled / results[-1].eager:.2f} times as fast")
    finally:
        torch.set_num_threads(threads)
    return results


def measure(config: Config, name: str, streams: int, rounds: int = ROUNDS) -> Speed:
    """Export a new model of a configuration, and measure both."""
    torch.manual_seed(0)
    model = MemoryTransformer(config).eval()
    n = model.segment_length
    with tempfile.TemporaryDirectory() as folder:
        before = cpu_seconds()
        path = export_model(model, Path(folder, "model.pt2"), streams)
        spent = cpu_seconds() - before
        step = torch._inductor.aoti_load_package(str(path))
    ids = torch.randint(config.model.vocab_size, (rounds, SEGMENTS, streams, n))
    mask, start = torch.ones(streams, n, dtype=torch.bool), torch.zeros(streams, dtype=torch.bool)
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    with torch.inference_mode():
        state = model.init_state(streams)
        flat = [tensor for _, tensor in named(state.memories)]
        for part in ids:
            begin = time.thread_time()
            for segment in part:
                outputs = model(segment, memory_state=state)
                state = outputs.memory_state
            middle = time.thread_time()
            for segment in part:
                logits, *flat = step(segment, mask, start, *flat)
            times["eager"].append(middle - begin)
            times["compiled"].append(time.thread_time() - middle)
        difference = float((logits - outputs.logits).abs().max())
    eager, compiled = (round(SEGMENTS * streams * n / median(seconds), 1) for seconds in times.values())
    return Speed(name, streams, n, round(spent, 1), eager, compiled, difference)


def cpu_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def to_table(results: Sequence[Speed]) -> str:
    """Results as a Markdown table."""
    head = ["model", "streams", "segment", "export, CPU-s", "eager, tokens/s", "compiled, tokens/s", "ratio"]
    rows = [
        [
            r.name,
            str(r.streams),
            str(r.segment_length),
            f"{r.compile_seconds:.1f}",
            f"{r.eager:,.0f}",
            f"{r.compiled:,.0f}",
            f"{r.compiled / r.eager:.2f}",
        ]
        for r in results
    ]
    return markdown(head, rows)
