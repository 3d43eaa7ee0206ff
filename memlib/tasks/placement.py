"""Random positions for blocks of tokens, for a whole batch at once.

Every placement is equally likely, so a model cannot predict positions.

Axes: b rows of the stream, t tokens, m blocks, w tokens of a block.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange


def random_subset(rng: np.random.Generator, rows: int, size: int, of: int) -> np.ndarray:
    """Draw for each row `size` distinct numbers of 0 … of - 1 in random order: [rows size]."""
    return rng.random((rows, of)).argsort(-1)[:, :size]


def place_blocks(rng: np.random.Generator, rows: int, blocks: int, width: int, room: int) -> np.ndarray:
    """Draw start positions of non-overlapping blocks of `width` tokens in `room` tokens: [rows blocks].

    Starts are ascending. Shrinking each block to one token maps placements one to one onto subsets of
    room - blocks (width - 1) positions, so a random subset gives a random placement. Raises ValueError if
    the blocks do not fit.
    """
    if blocks * width > room:
        raise ValueError(
            f"{blocks} blocks of {width} tokens: at most {room // width} fit in {room} tokens; "
            "use fewer blocks or more room"
        )
    starts = random_subset(rng, rows, blocks, of=room - blocks * (width - 1))
    starts.sort(-1)
    return starts + np.arange(blocks) * (width - 1)


def write_blocks(stream: np.ndarray, starts: np.ndarray, content: np.ndarray) -> None:
    """Write content [b m w] into stream [b t], block m of row b at starts[b, m]."""
    where = rearrange(starts, "b m -> b m 1") + np.arange(content.shape[-1])
    flat = "b m w -> b (m w)"
    np.put_along_axis(stream, rearrange(where, flat), rearrange(content, flat), axis=1)
