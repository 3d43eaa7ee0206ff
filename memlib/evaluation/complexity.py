"""How time and memory of attention and memories grow: fitted exponents beside the stated complexities.

A quantity that grows like x^a is a line of slope a in a double logarithmic plot. Each operation is measured
at several sizes of one axis while the others stay fixed; the slope is fitted in each of ROUNDS rounds, and
given as their mean with a 95 % interval (Student's t).

Axes: n tokens, m slots, d width, B side of a tile. Time is processor time of one thread; memory is the most
that an operation allocates at once, its result included. Bytes and operations of the tiled kernel are counted
in the interpreter (`memlib_kernels.interpreter`), where they are exact.
Source of the stated complexities: "LTM Transformer Architecture", Performance Characteristics
(docs/coverage.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from memlib.config.memory import LtmMemoryConfig
from memlib.evaluation.table import markdown
from memlib.memory.chapters.banks import StandardMemoryBank
from memlib.memory.ltm import LongTermMemory
from memlib_kernels.attention import flash_attention, flash_attention_reference
from memlib_kernels.memory_attention import memory_attention, memory_attention_reference

ROUNDS = 7
STUDENT_T = 2.447  # 97.5 % quantile for ROUNDS - 1 = 6 degrees of freedom


@dataclass(frozen=True)
class Law:
    """One complexity to check.

    name, stated: the operation, and what is said of it; quantity: "time", "memory", "operations" or "bytes";
    axis: the axis that grows, over `sizes`; expected: its exponent as stated; make(size): the operation.
    """

    name: str
    stated: str
    quantity: str
    axis: str
    expected: float
    sizes: Sequence[int]
    make: Callable[[int], Callable[[], object]]


@dataclass(frozen=True)
class Exponent:
    """A fitted exponent: mean and half the width of its 95 % interval; values: the median by size."""

    name: str
    stated: str
    quantity: str
    axis: str
    expected: float
    mean: float
    half: float
    sizes: list[int]
    values: list[float]


def attending(op: Callable[..., Any], n: int, m: int, d: int) -> Callable[[], object]:
    """An attention of n queries over m keys, one head of width d."""
    q, k, v = (torch.randn(1, 1, size, d) for size in (n, m, m))
    return lambda: op(q, k, v)


def compressing(n: int, d: int, slot: int | None = None) -> Callable[[], object]:
    """Long-term memory's compression of n tokens of width d to slots of `slot` values, d / 2 by default."""
    config = LtmMemoryConfig(num_slots=8, slot_dim=slot or d // 2, memory_compression_ratio=0.5)
    writer = LongTermMemory(config, d).eval().writer
    hidden, mask = torch.randn(1, n, d), torch.ones(1, n, dtype=torch.bool)
    segments = torch.zeros(1, dtype=torch.long)
    return lambda: writer.compress(hidden, mask, segments)


def tiled(block: int) -> Callable[[], object]:
    """Attention in tiles of a side, interpreted: its operations and bytes."""
    q = torch.randn(1, 1, 128, 64)
    return lambda: flash_attention(q, q, q)


def laws() -> list[Law]:
    """Everything that is measured, at sizes where the growing term dominates. Fixed: n = m = 1024, d = 64."""
    n, d = 1024, 64
    many, more, wide = (512, 1024, 2048, 4096), (4096, 8192, 16384, 32768), (512, 1024, 2048, 4096)
    plain, flash = flash_attention_reference, flash_attention
    found: list[Law] = []

    def add(name: str, stated: str, quantity: str, expected: float, axis: str, sizes: Any, make: Any) -> None:
        found.append(Law(name, stated, quantity, axis, expected, sizes, make))

    name, time_, space = "standard attention", "O(n² d)", "O(n²)"
    add(name, time_, "time", 2, "n", many, lambda x: attending(plain, x, x, d))
    add(name, time_, "time", 1, "d", wide, lambda x: attending(plain, n, n, x))
    add(name, space, "memory", 2, "n", many, lambda x: attending(plain, x, x, d))
    name, time_, space = "flash attention", "O(n² d / B)", "O(n)"
    add(name, time_, "time", 2, "n", many, lambda x: attending(flash, x, x, d))
    add(name, time_, "time", 1, "d", wide, lambda x: attending(flash, n, n, x))
    add(name, time_, "operations", -1, "B", (16, 32, 64, 128), tiled)
    add(name, time_, "bytes", -1, "B", (16, 32, 64, 128), tiled)
    add(name, space, "memory", 1, "n", more, lambda x: attending(flash, x, x, d))
    add("memory bank", "O(m)", "memory", 1, "m", more, lambda x: lambda: StandardMemoryBank(x, d))
    space, time_ = "O(n m)", "O(n m d)"
    for name, op, large in (
        ("memory attention, weights stored", memory_attention_reference, many),
        ("memory attention, weights not stored", memory_attention, more),
    ):
        add(name, time_, "time", 1, "n", large, lambda x, op=op: attending(op, x, n, d))
        add(name, time_, "time", 1, "m", large, lambda x, op=op: attending(op, n, x, d))
        add(name, time_, "time", 1, "d", wide, lambda x, op=op: attending(op, n, n, x))
        add(name, space, "memory", 1, "n", large, lambda x, op=op: attending(op, x, n, d))
        add(name, space, "memory", 1, "m", large, lambda x, op=op: attending(op, n, x, d))
    time_ = "O(n d)"
    for name, slot in (("memory compression, slots of 64", 64), ("memory compression, slots of d / 2", None)):
        add(name, time_, "time", 1, "n", more, lambda x, s=slot: compressing(x, 256, s))
        add(name, time_, "time", 1, "d", wide, lambda x, s=slot: compressing(n, x, s))
    return found


@torch.no_grad()
def measure_all(rounds: int = ROUNDS, log: Callable[[str], None] = print) -> list[Exponent]:
    """Measure every law: the sizes of an axis in turns, `rounds` times. Some minutes on one core."""
    results = []
    for law in laws():
        torch.manual_seed(0)
        calls = {size: law.make(size) for size in law.sizes}
        values = [[measure(law.quantity, calls[size], size) for size in law.sizes] for _ in range(rounds)]
        slopes = [slope(law.sizes, row) for row in values]
        mean = sum(slopes) / rounds
        deviation = sqrt(sum((x - mean) ** 2 for x in slopes) / max(1, rounds - 1))
        half = STUDENT_T * deviation / sqrt(rounds)
        median = [sorted(column)[rounds // 2] for column in zip(*values, strict=True)]
        stated = (law.name, law.stated, law.quantity, law.axis, law.expected)
        results.append(Exponent(*stated, round(mean, 3), round(half, 3), list(law.sizes), median))
        log(f"{law.name}, {law.quantity} over {law.axis}: {mean:.2f} ± {half:.2f}")
    return results


def measure(quantity: str, call: Callable[[], object], size: int) -> float:
    """One value of a quantity: seconds, bytes, or operations."""
    if quantity == "time":
        return seconds(call)
    if quantity == "memory":
        return float(peak_bytes(call))
    from memlib_kernels.interpreter import interpreted

    with interpreted(block=size, record=True) as record:
        call()
    return float(record.flops() if quantity == "operations" else record.bytes())


def seconds(call: Callable[[], object]) -> float:
    """The least processor time of a call, of several that take at least 20 ms together."""
    call()
    best, spent = float("inf"), 0.0
    while spent < 0.02:
        start = time.thread_time()
        call()
        best, spent = min(best, time.thread_time() - start), spent + time.thread_time() - start
    return best


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that torch has allocated at once during a call, beyond what was there before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise reports its own start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    now = most = 0
    for change in allocations(found):
        now += change
        most = max(most, now)
    del kept
    return most


def allocations(found: profile) -> list[int]:
    """Allocated (positive) and freed (negative) bytes, in order of time."""
    events, stack = [], list(cast(Any, found.profiler).kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        if event.name == "[memory]":
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(events, key=lambda pair: pair[0])]


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The least-squares slope of log(value) over log(size)."""
    x, y = [log(size) for size in sizes], [log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def to_table(results: Sequence[Exponent]) -> str:
    """Results as a Markdown table."""
    rows = [
        [
            r.name,
            r.quantity,
            r.stated,
            r.axis,
            f"{r.sizes[0]} … {r.sizes[-1]}",
            f"{r.expected:g}",
            f"{r.mean:.2f} ± {r.half:.2f}",
        ]
        for r in results
    ]
    return markdown(["operation", "quantity", "stated", "axis", "sizes", "exponent stated", "measured"], rows)
