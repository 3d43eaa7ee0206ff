"""Padding and waiting with documents of very different lengths, by how batches are made of them.

A batch of b rows is divided among ranks. A rank computes its rows up to its longest one, in whole segments,
and all ranks wait for the one with the most to compute.

    padding    share of the computed tokens that are not of any document
    idle       share of the ranks' time that they wait

Lengths are log-normal, as those of web pages roughly are: half of the tokens are in the longest tenth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memlib.evaluation.table import markdown
from memlib.tasks.lanes import assign, buckets

SEEDS, DOCUMENTS, ROWS, RANKS, SEGMENT, SEGMENTS = (0, 1, 2), 4000, 32, 4, 64, 16
MEDIAN, DEVIATION = 400.0, 1.3  # of a length in tokens; of its logarithm

Rows = list[np.ndarray | list[int]]  # the tokens of each row of a batch, document by document


@dataclass(frozen=True)
class Balance:
    """Padding and idle share of some batches; batches: number of them."""

    name: str
    seed: int
    batches: int
    padding: float
    idle: float


def measure(name: str, seed: int, batches: list[Rows]) -> Balance:
    """The shares of some batches; each segment holds tokens of one document."""
    real = computed = longest = 0
    for batch in batches:
        segments = [sum(-(-length // SEGMENT) for length in row) for row in batch]
        ranks = np.array_split(np.array(segments), RANKS)
        work = [len(rank) * int(rank.max(initial=0)) * SEGMENT for rank in ranks]
        real += sum(map(sum, batch))
        computed += sum(work)
        longest += RANKS * max(work)
    return Balance(name, seed, len(batches), 1 - real / computed, 1 - computed / longest)


def in_order(lengths: np.ndarray, rng: np.random.Generator) -> list[Rows]:
    """Naive: the next documents of the data, one in each row."""
    return [[[length] for length in lengths[i : i + ROWS]] for i in range(0, len(lengths), ROWS)]


def cut(lengths: np.ndarray) -> np.ndarray:
    """Pieces of at most SEGMENTS segments."""
    size = SEGMENT * SEGMENTS
    return np.array([min(size, length - i) for length in lengths for i in range(0, length, size)])


def cut_in_order(lengths: np.ndarray, rng: np.random.Generator) -> list[Rows]:
    return in_order(cut(lengths), rng)


def in_buckets(lengths: np.ndarray, rng: np.random.Generator) -> list[Rows]:
    pieces = cut(lengths)
    return [[[pieces[i]] for i in rows] for rows in buckets(-(-pieces // SEGMENT), ROWS, SEGMENTS, rng)]


def in_turn(lengths: np.ndarray, rng: np.random.Generator) -> list[Rows]:
    """Lanes that get the documents in turn. A lane goes on from batch to batch: the whole epoch is one."""
    return [[lengths[lane::ROWS] for lane in range(ROWS)]]


def in_lanes(lengths: np.ndarray, rng: np.random.Generator) -> list[Rows]:
    return [[lengths[documents] for documents in assign(-(-lengths // SEGMENT), ROWS, rng)]]


WAYS: dict[str, Callable[[np.ndarray, np.random.Generator], list[Rows]]] = {
    "a document a row, in order": in_order,
    "a piece a row, in order": cut_in_order,
    "buckets": in_buckets,
    "lanes, documents in turn": in_turn,
    "lanes": in_lanes,
}


def measure_all(log: Callable[[str], None]) -> list[Balance]:
    """Every way of making batches, on the same lengths, with each seed."""
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        lengths = np.ceil(rng.lognormal(np.log(MEDIAN), DEVIATION, DOCUMENTS)).astype(int)
        found += [measure(name, seed, make(lengths, rng)) for name, make in WAYS.items()]
        log(f"seed {seed}: {DOCUMENTS} documents of {lengths.min()} to {lengths.max()} tokens")
    return found


def to_table(results: list[Balance]) -> str:
    """One row for each way: the range over the seeds."""
    rows = []
    for name in dict.fromkeys(r.name for r in results):
        shares = [sorted(getattr(r, part) for r in results if r.name == name) for part in ("padding", "idle")]
        rows.append([name, *(f"{share[0]:.1%} – {share[-1]:.1%}" for share in shares)])
    return markdown(["batches", "padding", "idle"], rows)
