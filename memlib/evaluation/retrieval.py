"""Retrieval benchmarks: latency together with recall, and accuracy by index.

`measure_index` times one index over random unit keys. These are hard for an approximate index, because they
have no clusters. `measure_task` measures a trained model's accuracy with each index.

Axes: 1 head, keys or queries, dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memlib.config import IndexConfig
from memlib.evaluation.evaluate import evaluate
from memlib.memory.external.columns import Shape
from memlib.memory.external.index import library
from memlib.memory.external.store import Store
from memlib.models import MemoryTransformer
from memlib.models.stores import attach_stores, detach_stores
from memlib.tasks import Task

EXACT = 2**62  # more keys than any stream has, so torch always searches exactly
INDEXES = {
    "torch": IndexConfig(exact_below=EXACT),
    "flat": IndexConfig(kind="flat", exact_below=0),
    "ivf": IndexConfig(kind="ivf", exact_below=0),
    "ivfpq": IndexConfig(kind="ivfpq", exact_below=0),
    "hnsw": IndexConfig(kind="hnsw", exact_below=0),
    # The settings of memorizing-transformers-pytorch.
    "hnsw 15/16": IndexConfig(
        kind="hnsw", exact_below=0, hnsw_links=15, hnsw_ef_construction=40, hnsw_ef_search=16
    ),
}


def named_index(name: str) -> IndexConfig:
    """One of `INDEXES` by name; raises ValueError for an unknown name."""
    if name not in INDEXES:
        raise ValueError(f"index {name!r}: choose one of {', '.join(INDEXES)}")
    return INDEXES[name]


@dataclass(frozen=True)
class IndexResult:
    """Measurements of one index.

    milliseconds: median CPU time of one search for all queries, on one thread; recall: fraction of the true
    top_k that is retrieved; overhead: time / time of FAISS's own search of the same index, measured
    alternately (None for torch); build_seconds: time of the first search, which builds the index.
    """

    index: str
    keys: int
    milliseconds: float
    recall: float
    overhead: float | None
    build_seconds: float


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of a trained model on a task with one index; seconds: for all examples."""

    index: str
    segments: int
    accuracy: float
    seconds: float


def random_keys(count: int, dim: int, seed: int) -> Tensor:
    """Random unit vectors of one head: [1 count dim]."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(1, count, dim, generator=generator), dim=-1)


def measure_index(
    name: str, keys: int, dim: int = 64, queries: int = 64, top_k: int = 32, repeats: int = 15
) -> IndexResult:
    """Measure latency and recall of one of `INDEXES` on random keys."""
    library().omp_set_num_threads(1)
    torch.set_num_threads(1)
    stored, query = random_keys(keys, dim, 0), random_keys(queries, dim, 1)
    store = Store(Shape(1, dim, dim), INDEXES[name])
    stream, cursor = store.append(store.new_stream(), 0, stored, stored)

    def search() -> Tensor:
        return store.search(stream, cursor, query, top_k, keys=False).serial[0]

    before = time.perf_counter()
    found = search()
    built = time.perf_counter() - before
    truth = (query[0] @ stored[0].mT).topk(top_k, -1).indices
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found.numpy(), truth.numpy(), strict=True))
    raw = raw_search(store, query[0].numpy(), top_k) if name != "torch" else None
    mine, theirs = in_turns(search, raw, repeats)
    return IndexResult(
        name,
        keys,
        1000 * median(mine),
        hits / truth.numel(),
        median(m / t for m, t in zip(mine, theirs, strict=True)) if raw else None,
        built,
    )


def raw_search(store: Store, query: np.ndarray, top_k: int) -> Callable[[], object] | None:
    """FAISS's own search of the store's index, which omits only the newest keys; None without an index."""
    if not store.streams[0].indexes:
        return None
    index = store.streams[0].indexes[0]
    parameters = index.parameters(top_k)
    return lambda: index.faiss.search(query, top_k, params=parameters)


def in_turns(
    mine: Callable[[], object], theirs: Callable[[], object] | None, repeats: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of each call of two functions, called alternately, so that a busy machine slows both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for spent, call in zip(seconds, (mine, theirs), strict=True):
            if call is not None:
                before = time.thread_time()
                call()
                spent.append(time.thread_time() - before)
    return seconds


def measure_task(
    model: MemoryTransformer, task: Task, names: Sequence[str], examples: int, exact_below: int = 0
) -> list[TaskResult]:
    """Accuracy of the model with its state (row `state`), then with a store for each index."""
    results = []
    for name in ("state", *names):
        if name != "state":
            below = EXACT if name == "torch" else exact_below
            attach_stores(model, index=replace(INDEXES[name], exact_below=below))
        before = time.perf_counter()
        accuracy = evaluate(model, task, examples, batch_size=16).accuracy
        results.append(TaskResult(name, task.segments, accuracy, time.perf_counter() - before))
    detach_stores(model)
    return results


def index_table(results: Sequence[IndexResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: latency and recall by index."""
    head = ["keys", "index", "ms per batch", "recall", "over raw FAISS", "first search, s"]
    rows = [
        [
            f"{r.keys:,}",
            r.index,
            f"{r.milliseconds:.1f}",
            f"{r.recall:.3f}",
            f"{r.overhead:.2f}×" if r.overhead else "–",
            f"{r.build_seconds:.1f}",
        ]
        for r in results
    ]
    return head, rows


def task_table(results: Sequence[TaskResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: accuracy by index."""
    head = ["index", "segments", "accuracy", "s"]
    return head, [[r.index, str(r.segments), f"{r.accuracy:.4f}", f"{r.seconds:.1f}"] for r in results]
