"""Random places for blocks of tokens, a whole batch at a time.

Every placement is equally likely, so that a position tells nothing but where the block is.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange


def random_subset(rng: np.random.Generator, rows: int, size: int, of: int) -> np.ndarray:
    """[rows size]: for each row, `size` distinct numbers of 0 … of - 1 in random order."""
    return rng.random((rows, of)).argsort(-1)[:, :size]


def place_blocks(rng: np.random.Generator, rows: int, blocks: int, width: int, room: int) -> np.ndarray:
    """[rows blocks]: ascending starts of blocks of `width` tokens, disjoint within `room`.

    Shrinking each block to one token maps the placements one to one onto the subsets of
    room - blocks (width - 1) positions: a random subset, stretched again, is a random placement.
    Raises ValueError if the blocks do not fit.
    """
    if blocks * width > room:
        raise ValueError(
            f"{blocks} blocks of {width} tokens: at most {room // width} fit in {room} tokens; "
            "ask for fewer blocks or more room"
        )
    starts = random_subset(rng, rows, blocks, of=room - blocks * (width - 1))
    starts.sort(-1)
    return starts + np.arange(blocks) * (width - 1)


def write_blocks(stream: np.ndarray, starts: np.ndarray, content: np.ndarray) -> None:
    """Overwrite stream [b t] with content [b m w], block m of row b from starts[b, m] on."""
    where = rearrange(starts, "b m -> b m 1") + np.arange(content.shape[-1])
    flat = "b m w -> b (m w)"
    np.put_along_axis(stream, rearrange(where, flat), rearrange(content, flat), axis=1)
