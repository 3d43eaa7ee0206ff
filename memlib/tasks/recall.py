"""Associative recall across segments: key-value pairs first, queries in the last segment.

Axes: b batch, t tokens of the stream, n tokens of a segment, s segments with pairs, p pairs.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange

from memlib.config import RecallConfig
from memlib.tasks.base import GeneratedTask
from memlib.tasks.placement import place_blocks, random_subset, write_blocks
from memlib.tasks.vocabulary import Vocabulary, numbered


class Recall(GeneratedTask):
    """`. k3 v7 . k1 v2 | . . . . | . ? k1 v2 ? k3 v7`: pairs, noise, then queries in random order.

    The pairs are in the first segment, or spread evenly over as many segments as they need. Each rewrite
    shows one of the keys again with a different value, in a segment between the pairs and the queries; the
    last value counts. The scored positions are the keys of the queries.

    Keys are distinct within an example. Values are independent and uniform, so earlier answers carry no
    information about later ones, and chance is exactly 1 / num_values.

    Raises ValueError if pairs, rewrites or queries do not fit.
    Source: MQAR (Zoology, arXiv 2312.04927), cut into segments; rewrites as in ARMT
    (arXiv 2407.04841).
    """

    def __init__(
        self,
        config: RecallConfig,
        segment_length: int,
        segments: int = 4,
        segments_min: int | None = None,
    ) -> None:
        pairs, n = config.num_pairs, segment_length
        queries = pairs if config.num_queries is None else config.num_queries
        name = "num_pairs" if config.num_queries is None else "num_queries"
        if pairs > config.num_keys:
            raise ValueError(f"num_pairs = {pairs}: at most num_keys = {config.num_keys}; raise num_keys")
        if queries > pairs:
            raise ValueError(f"num_queries = {queries}: at most num_pairs = {pairs}; lower it")
        if 3 * queries > n:
            raise ValueError(
                f"{name} = {queries}: queries take 3 tokens each and at most {n // 3} fit in a "
                f"segment_length of {n}; lower {name} or raise segment_length"
            )
        if config.rewrites > min(pairs, n // 2):
            raise ValueError(
                f"rewrites = {config.rewrites}: at most {min(pairs, n // 2)} (one for each of "
                f"{pairs} pairs, and 2 tokens each in a segment_length of {n}); lower rewrites"
            )
        self.pair_segments = -(-pairs // (n // 2))
        least = self.pair_segments + 1 + bool(config.rewrites)
        super().__init__(segment_length, segments, segments_min, least)
        self.config, self.num_queries = config, queries
        self.chance = 1 / config.num_values
        self.vocabulary = Vocabulary(
            {
                "pad": ["_"],
                "query": ["?"],
                "filler": ["."] * config.num_fillers,
                "key": numbered("k", config.num_keys),
                "value": numbered("v", config.num_values),
            }
        )

    def generate(
        self, rng: np.random.Generator, batch_size: int, segments: int
    ) -> tuple[np.ndarray, np.ndarray]:
        b, n, c = batch_size, self.segment_length, self.config
        filler, key, value = (self.vocabulary[f] for f in ("filler", "key", "value"))
        stream = rng.integers(filler.start, filler.stop, (b, segments * n + 1))

        keys = key.start + random_subset(rng, b, c.num_pairs, of=c.num_keys)
        values = rng.integers(value.start, value.stop, (b, c.num_pairs))
        write_blocks(stream, self._pair_starts(rng, b), np.stack((keys, values), -1))

        if c.rewrites:
            again = random_subset(rng, b, c.rewrites, of=c.num_pairs)
            old = np.take_along_axis(values, again, 1)
            change = rng.integers(1, c.num_values, again.shape)
            new = value.start + (old - value.start + change) % c.num_values
            np.put_along_axis(values, again, new, 1)
            # Blocks that do not overlap in one segment still do not when each moves to another segment.
            segment = rng.integers(self.pair_segments, segments - 1, again.shape)
            starts = segment * n + place_blocks(rng, b, c.rewrites, 2, n)
            write_blocks(stream, starts, np.stack((np.take_along_axis(keys, again, 1), new), -1))

        asked = random_subset(rng, b, self.num_queries, of=c.num_pairs)
        starts = (segments - 1) * n + place_blocks(rng, b, self.num_queries, 3, n)
        mark = np.full_like(asked, self.vocabulary["query"].start)
        known = (np.take_along_axis(part, asked, 1) for part in (keys, values))
        write_blocks(stream, starts, np.stack((mark, *known), -1))
        scored = np.zeros((b, segments * n), dtype=bool)
        np.put_along_axis(scored, starts + 1, True, 1)
        return stream, scored

    def _pair_starts(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Start positions of the pairs, spread evenly over the first segments: [b p]."""
        n, s = self.segment_length, self.pair_segments
        each = -(-self.config.num_pairs // s)
        starts = rearrange(
            place_blocks(rng, batch_size * s, each, 2, n), "(b s) p -> b s p", s=s
        ) + rearrange(np.arange(s) * n, "s -> s 1")
        return rearrange(starts, "b s p -> b (s p)")[:, : self.config.num_pairs]

    def solve(self, row: list[int]) -> list[int]:
        """At every key, predict the value that last followed it."""
        latest: dict[int, int] = {}
        predictions, previous = [], 0
        for token in row:
            if previous in self.vocabulary["key"] and token in self.vocabulary["value"]:
                latest[previous] = token
            predictions.append(latest.get(token, 0))
            previous = token
        return predictions
