"""Passkey retrieval: a key hidden in noise; the last segment asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from memlib.config import PasskeyConfig
from memlib.tasks.base import GeneratedTask
from memlib.tasks.placement import place_blocks, write_blocks
from memlib.tasks.vocabulary import Vocabulary, numbered


class Passkey(GeneratedTask):
    """`. ! 4 2 . | . . . . | . . ? 4 2 .`: the key after its mark, noise, then the query.

    The key is in segment round(depth * (segments - 2)), or in a random one before the last if depth is
    null. The scored positions are those that predict the answer's digits. Digits are independent and
    uniform, so chance is exactly 1 / num_symbols.

    Raises ValueError if the key does not fit a segment or the depth is outside 0 … 1.
    Source: the passkey task of Infini-attention (arXiv 2404.07143), with tokens for words.
    """

    def __init__(
        self,
        config: PasskeyConfig,
        segment_length: int,
        segments: int = 4,
        segments_min: int | None = None,
    ) -> None:
        super().__init__(segment_length, segments, segments_min)
        if config.num_digits + 1 > segment_length:
            raise ValueError(
                f"num_digits = {config.num_digits}: at most {segment_length - 1} fit after their "
                f"mark in a segment_length of {segment_length}; lower num_digits"
            )
        if config.depth is not None and not 0 <= config.depth <= 1:
            raise ValueError(f"depth = {config.depth}: must be from 0 to 1, or null for random")
        self.config = config
        self.chance = 1 / config.num_symbols
        self.vocabulary = Vocabulary(
            {
                "pad": ["_"],
                "query": ["?"],
                "mark": ["!"],
                "filler": ["."] * config.num_fillers,
                "digit": numbered("", config.num_symbols),
            }
        )

    def generate(
        self, rng: np.random.Generator, batch_size: int, segments: int
    ) -> tuple[np.ndarray, np.ndarray]:
        b, n, c = batch_size, self.segment_length, self.config
        filler, digit = self.vocabulary["filler"], self.vocabulary["digit"]
        stream = rng.integers(filler.start, filler.stop, (b, segments * n + 1))
        digits = rng.integers(digit.start, digit.stop, (b, 1, c.num_digits))
        if c.depth is None:
            shown = rng.integers(0, segments - 1, (b, 1))
        else:
            shown = np.full((b, 1), round(c.depth * (segments - 2)))
        for family, segment in (("mark", shown), ("query", np.full((b, 1), segments - 1))):
            starts = segment * n + place_blocks(rng, b, 1, c.num_digits + 1, n)
            first = np.full((b, 1, 1), self.vocabulary[family].start)
            write_blocks(stream, starts, np.concatenate((first, digits), -1))
        scored = np.zeros((b, segments * n), dtype=bool)
        np.put_along_axis(scored, starts + np.arange(c.num_digits), True, 1)
        return stream, scored

    def solve(self, row: list[int]) -> list[int]:
        """After the query, predict the key's digits in order."""
        key: list[int] = []
        answer: Iterator[int] = iter(())
        predictions, after = [], ""
        for token in row:
            if token in self.vocabulary["mark"]:
                after, key = "mark", []
            elif token in self.vocabulary["query"]:
                after, answer = "query", iter(key)
            elif token not in self.vocabulary["digit"]:
                after = ""
            elif after == "mark":
                key.append(token)
            predictions.append(next(answer, 0) if after == "query" else 0)
        return predictions


def passkey_grid(
    config: PasskeyConfig, segment_length: int, segments: Sequence[int], depths: Sequence[float]
) -> dict[tuple[int, float], Passkey]:
    """One task for each (length in segments, depth), for a heatmap of length by depth."""
    return {
        (length, depth): Passkey(dataclasses.replace(config, depth=depth), segment_length, length)
        for length in segments
        for depth in depths
    }
