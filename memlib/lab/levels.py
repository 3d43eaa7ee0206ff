"""Measures of a hierarchy of states from a recording: what each token can see of each level, and reads.

Axes: n tokens of the stream, l levels, m complete blocks, k banks, s slots (of one bank, or of all), t
segments, r kept blocks. A recording starts at a segment's border; its last segment may be open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from einops import rearrange, reduce

from memlib.lab.trace import Trace, TraceError


@dataclass(frozen=True)
class Levels:
    """Measures of one stream in one layer.

    level: [n l], weight of each level in a token's read; sums to 1 over l.
    bounds: [m 2], first and last token of each completed block; block: [n m], weight of each block in a
    token's read of level 1, 0 if not visible; nothing: [n], weight of the empty block.
    read: [n k], weight of each bank in a token's read of level 3; written: [n k], strength of a token's write
    to each bank (input gate times bank weight); filled: [n], how full the token's block is after it.
    left: [t n k], fraction of a token's write to a bank that remains when segment t is read.
    half_lives: [k], mean over this stream's tokens, in segments; norm: [t s], of each slot when segment t is
    read.
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
    """Compute the measures of `Levels`; raises TraceError for a memory without levels."""
    if f"{memory}.level" not in trace:
        raise TraceError(f"{memory}: has no levels; recorded: {', '.join(trace) or 'nothing'}")

    def point(name: str) -> np.ndarray:
        return trace[f"{memory}.{name}"].at(layer=layer, batch=row).values

    level, share, decay = point("level"), point("banks.writer.bank"), point("banks.writer.decay")
    slots = point("banks.before")
    tokens, length = len(level), len(decay) // len(slots)
    if not 0 <= tokens - len(decay) < length:
        raise TraceError(
            f"{memory}: {len(decay)} tokens written and {tokens} read; start recording at a segment's border"
        )
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
    """Append zeros for the tokens of an open segment, which are not written yet."""
    return np.concatenate((values, np.zeros((tokens - len(values), *values.shape[1:]), values.dtype)))


def what_is_left(written: np.ndarray, log_decay: np.ndarray, length: int, steps: int) -> np.ndarray:
    """left_tnk = written_nk prod_{n < v < start of t} decay_vk for tokens n before segment t: [t n k]."""
    left = np.zeros((steps, *written.shape))
    for t in range(1, steps):
        past = slice(0, t * length)
        later = log_decay[past].sum(0) - log_decay[past].cumsum(0)
        left[t, past] = written[past] * np.exp(later)
    return left


def blocks_of(
    weight: np.ndarray, filled: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute bounds [m 2], block [n m] and nothing [n] from the weights of kept blocks [n 1+r], newest last.

    A block is complete with the token that fills it (filled: [n] is 1), and visible from the next segment on.
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
