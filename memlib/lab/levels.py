"""What a recording says about a hierarchy of states: what each token could see of each level, and took.

Axes: n tokens of the stream, l levels, m complete blocks, k banks, s slots of all banks, t segments. A
recording starts at a segment's border; its last segment may be open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from einops import rearrange, reduce

from memlib.lab.trace import Trace, TraceError


@dataclass(frozen=True)
class Levels:
    """One stream of one layer.

    level: [n l], how much of a token's reading is each level's; they sum to 1.
    bounds: [m 2], first and last token of each block that was completed; block: [n m], the weight a token
    gives it among the blocks, 0 where it cannot see it; nothing: [n], the weight of the empty block.
    read: [n k], how much of what a token reads from level 3 is each bank's; written: [n k], how strongly
    it writes to each bank (input gate times share); filled: [n], how full its block is with it.
    left: [t n k], how much of what a token wrote to a bank is still there when segment t is read.
    half_lives: [k], in segments, as this stream's tokens had them; norm: [t s], of each slot when segment t
    is read.
    """

    segment_length: int
    level: np.ndarray
    bounds: np.ndarray
    block: np.ndarray
    nothing: np.ndarray
    read: np.ndarray
    written: np.ndarray
    filled: np.ndarray
    left: np.ndarray
    half_lives: np.ndarray
    norm: np.ndarray


def levels_of(trace: Trace, memory: str = "hds", row: int = 0, layer: int = 0) -> Levels:
    """Everything a token's four levels had to say. Raises TraceError for a memory without levels."""
    if f"{memory}.level" not in trace:
        raise TraceError(f"{memory}: has no levels; recorded: {', '.join(trace) or 'nothing'}")

    def point(name: str) -> np.ndarray:
        return trace[f"{memory}.{name}"].at(layer=layer, batch=row).values

    level, share, decay = point("level"), point("banks.writer.bank"), point("banks.writer.decay")
    slots = point("banks.before")
    tokens, length = len(level), len(decay) // len(slots)
    if not 0 <= tokens - len(decay) < length:
        raise TraceError(f"{memory}: {len(decay)} tokens written and {tokens} read; record from a border on")
    steps = -(-tokens // length)
    opened = rearrange(point("banks.writer.input"), "n -> n 1")
    written = padded(share * opened, tokens)
    bounds, block, nothing = blocks_of(point("blocks.weight"), point("blocks.filled"), length)
    after = point("banks.after")
    seen = np.concatenate((slots, after[-1:]))[:steps]
    return Levels(
        length,
        level,
        bounds,
        block,
        nothing,
        reduce(point("banks.reader.weight"), "n (k s) -> n k", "sum", k=share.shape[1]),
        written,
        padded(point("blocks.filled"), tokens),
        what_is_left(written, np.log(decay), length, steps),
        -np.log(2) / (length * np.log(decay).mean(0)),
        np.linalg.norm(seen, axis=-1),
    )


def padded(values: np.ndarray, tokens: int) -> np.ndarray:
    """Zeros for the tokens of an open segment, which are not written yet."""
    return np.concatenate((values, np.zeros((tokens - len(values), *values.shape[1:]), values.dtype)))


def what_is_left(written: np.ndarray, log_decay: np.ndarray, length: int, steps: int) -> np.ndarray:
    """left_tuk = written_uk prod_{u < v < tn} decay_vk for the tokens u before segment t: [t n k]."""
    left = np.zeros((steps, *written.shape))
    for t in range(1, steps):
        past = slice(0, t * length)
        later = log_decay[past].sum(0) - log_decay[past].cumsum(0)
        left[t, past] = written[past] * np.exp(later)
    return left


def blocks_of(
    weight: np.ndarray, filled: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bounds [m 2], block [n m] and nothing [n] from the weights of the kept blocks: [n 1+r], newest last.

    A block is complete with the token that fills it, where filled: [n] is 1, and seen from the next segment
    on.
    """
    last = np.flatnonzero(filled == 1)
    first = np.concatenate(([0], last + 1))[: len(last)]
    kept, block = weight.shape[1] - 1, np.zeros((len(weight), len(last)), weight.dtype)
    for t in range(0, len(weight), length):
        there = int((last < t).sum())
        newest = min(there, kept)
        now = slice(t, t + length)
        block[now, there - newest : there] = weight[now, 1 + kept - newest :]
    return np.stack((first, last), 1), block, weight[:, 0]
