"""Copy and selective copy: repeat symbols in order.

Axes: b batch, t tokens of the stream, n tokens of a segment, w tokens of a block.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange

from memlib.config import CopyConfig
from memlib.tasks.base import GeneratedTask
from memlib.tasks.placement import place_blocks, write_blocks
from memlib.tasks.vocabulary import Vocabulary, numbered


class Copy(GeneratedTask):
    """`. a5 a1 a1 . | . . . . | . > a5 a1 a1 .`: a run of symbols, noise, then the copy.

    Selective: the symbols are scattered over all segments but the last, in the same order. The scored
    positions are those that predict the copied symbols. Symbols are independent and uniform, so chance is
    exactly 1 / num_symbols.

    Raises ValueError if the symbols and their mark do not fit into one segment.
    Source: the copy task of Neural Turing Machines (arXiv 1410.5401); selective copying as in Mamba
    (arXiv 2312.00752).
    """

    def __init__(
        self,
        config: CopyConfig,
        segment_length: int,
        segments: int = 4,
        segments_min: int | None = None,
    ) -> None:
        super().__init__(segment_length, segments, segments_min)
        if config.num_items + 1 > segment_length:
            raise ValueError(
                f"num_items = {config.num_items}: at most {segment_length - 1} fit after their "
                f"mark in a segment_length of {segment_length}; lower num_items"
            )
        self.config = config
        self.chance = 1 / config.num_symbols
        self.vocabulary = Vocabulary(
            {
                "pad": ["_"],
                "go": [">"],
                "filler": ["."] * config.num_fillers,
                "symbol": numbered("a", config.num_symbols),
            }
        )

    def generate(
        self, rng: np.random.Generator, batch_size: int, segments: int
    ) -> tuple[np.ndarray, np.ndarray]:
        b, n, c = batch_size, self.segment_length, self.config
        filler, symbol = self.vocabulary["filler"], self.vocabulary["symbol"]
        stream = rng.integers(filler.start, filler.stop, (b, segments * n + 1))
        items = rng.integers(symbol.start, symbol.stop, (b, c.num_items))
        if c.selective:
            scattered = place_blocks(rng, b, c.num_items, 1, (segments - 1) * n)
            np.put_along_axis(stream, scattered, items, 1)
        else:
            run = place_blocks(rng, b, 1, c.num_items, n)
            write_blocks(stream, run, rearrange(items, "b w -> b 1 w"))
        go = (segments - 1) * n + place_blocks(rng, b, 1, c.num_items + 1, n)
        mark = np.full((b, 1), self.vocabulary["go"].start)
        copied = np.concatenate((mark, items), -1)
        write_blocks(stream, go, rearrange(copied, "b w -> b 1 w"))
        scored = np.zeros((b, segments * n), dtype=bool)
        np.put_along_axis(scored, go + np.arange(c.num_items), True, 1)
        return stream, scored

    def solve(self, row: list[int]) -> list[int]:
        """After the mark, predict the symbols in the order in which they appeared."""
        seen: list[int] = []
        predictions, answer = [], None
        for token in row:
            if token in self.vocabulary["go"]:
                answer = iter(seen)
            elif token in self.vocabulary["symbol"] and answer is None:
                seen.append(token)
            predictions.append(0 if answer is None else next(answer, 0))
        return predictions
