"""Where documents go in a batch: pure functions of their lengths and of a generator of (seed, epoch).

Documents of very different lengths leave places of a batch without a token in two ways: padding behind a
document, and rows that have nothing left while others still read. Two layouts keep both small:

    lanes      a row reads one document after another; each document goes to the row with the least to read
    buckets    a row is one document; a batch holds documents of similar length, the fewer the longer they are

Lengths are in segments. The number of batches depends on the lengths only, not on the generator, so that
(epoch, batch of the epoch) is a function of the step.
"""

from __future__ import annotations

import heapq

import numpy as np


def longest_first(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Documents by falling length, equal ones in random order: [d]."""
    order = rng.permutation(len(lengths))
    return order[np.argsort(-lengths[order], kind="stable")]


def assign(lengths: np.ndarray, lanes: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The documents of each lane, in the order in which it reads them.

    The longest document left goes to the lane with the least to read so far; then each lane's order is drawn.
    The longest lane is at most 4/3 of the shortest possible (Graham 1969, "Bounds on Multiprocessing Timing
    Anomalies").
    """
    loads = [(0, lane) for lane in range(lanes)]
    found: list[list[int]] = [[] for _ in range(lanes)]
    for document in longest_first(lengths, rng):
        load, lane = heapq.heappop(loads)
        found[lane].append(document)
        heapq.heappush(loads, (load + int(lengths[document]), lane))
    return [rng.permutation(np.array(documents, dtype=np.int64)) for documents in found]


def buckets(
    lengths: np.ndarray, batch_size: int, segments: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The documents of each batch: rows x longest length <= batch_size x segments, batches in random order.

    The number of rows is a multiple of batch_size, so that data-parallel ranks can divide them; only the
    batch of the shortest documents may have fewer. No length may be above `segments`.
    """
    order, batches = longest_first(lengths, rng), []
    while len(order):
        rows = batch_size * (segments // int(lengths[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    return [batches[i] for i in rng.permutation(len(batches))]
