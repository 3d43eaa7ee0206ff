"""Facts and registers: facts are shown once, registers are set several times and the last value counts.

Axes: b batch, t tokens of the stream, n tokens of a segment, p pairs, q queries, r registers, w settings of
a register.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange, repeat

from memlib.config import MixedConfig
from memlib.tasks.base import GeneratedTask
from memlib.tasks.placement import place_blocks, random_subset, write_blocks
from memlib.tasks.vocabulary import Vocabulary, numbered


class Mixed(GeneratedTask):
    """`f7 v3 . r1 v2 | r1 v9 . f2 v3 | . ? f2 v3 ? r1 v9`: two demands on memory in one stream.

    There are many facts, each shown once, and any may be queried. There are few registers, each set several
    times; the last value counts. All pairs are in random order, spread evenly over the segments before the
    last. The last segment queries some facts and some registers. The scored positions are the queried keys.

    Values are independent and uniform, so chance is exactly 1 / num_values for both.

    Raises ValueError if pairs or queries do not fit.
    Source: MQAR (Zoology, arXiv 2312.04927) beside ARMT's rewrites (arXiv 2407.04841).
    """

    def __init__(
        self,
        config: MixedConfig,
        segment_length: int,
        segments: int = 6,
        segments_min: int | None = None,
    ) -> None:
        pairs, n = config.num_facts + config.num_registers * config.num_settings, segment_length
        queries = config.fact_queries + config.register_queries
        for name, asked, shown in (
            ("fact_queries", config.fact_queries, config.num_facts),
            ("register_queries", config.register_queries, config.num_registers),
            ("num_facts", config.num_facts, config.num_fact_keys),
        ):
            if asked > shown:
                raise ValueError(f"{name} = {asked}: at most {shown} are available; lower it")
        if 3 * queries > n:
            raise ValueError(
                f"fact_queries + register_queries = {queries}: they take 3 tokens each and at most "
                f"{n // 3} fit in a segment_length of {n}; lower them or raise segment_length"
            )
        super().__init__(segment_length, segments, segments_min, least=1 + -(-pairs // (n // 2)))
        self.config, self.num_pairs = config, pairs
        self.chance = 1 / config.num_values
        self.vocabulary = Vocabulary(
            {
                "pad": ["_"],
                "query": ["?"],
                "filler": ["."] * config.num_fillers,
                "fact": numbered("f", config.num_fact_keys),
                "register": numbered("r", config.num_registers),
                "value": numbered("v", config.num_values),
            }
        )

    def generate(
        self, rng: np.random.Generator, batch_size: int, segments: int
    ) -> tuple[np.ndarray, np.ndarray]:
        b, n, c = batch_size, self.segment_length, self.config
        filler, fact, register, value = (self.vocabulary[f] for f in ("filler", "fact", "register", "value"))
        stream = rng.integers(filler.start, filler.stop, (b, segments * n + 1))

        facts = fact.start + random_subset(rng, b, c.num_facts, of=c.num_fact_keys)
        registers = repeat(np.arange(register.start, register.stop), "r -> b (r w)", b=b, w=c.num_settings)
        keys = np.concatenate((facts, registers), 1)
        keys = np.take_along_axis(keys, random_subset(rng, b, self.num_pairs, of=self.num_pairs), 1)
        values = rng.integers(value.start, value.stop, keys.shape)
        write_blocks(stream, self._pair_starts(rng, b, segments), np.stack((keys, values), -1))

        asked = np.concatenate(
            (
                np.take_along_axis(facts, random_subset(rng, b, c.fact_queries, of=c.num_facts), 1),
                register.start + random_subset(rng, b, c.register_queries, of=c.num_registers),
            ),
            1,
        )
        order = random_subset(rng, b, asked.shape[1], of=asked.shape[1])
        asked = np.take_along_axis(asked, order, 1)
        # The last occurrence of a queried key has the value that counts.
        same = rearrange(keys, "b p -> b 1 p") == rearrange(asked, "b q -> b q 1")
        last = self.num_pairs - 1 - np.argmax(same[..., ::-1], -1)
        answers = np.take_along_axis(values, last, 1)
        starts = (segments - 1) * n + place_blocks(rng, b, asked.shape[1], 3, n)
        mark = np.full_like(asked, self.vocabulary["query"].start)
        write_blocks(stream, starts, np.stack((mark, asked, answers), -1))
        scored = np.zeros((b, segments * n), dtype=bool)
        np.put_along_axis(scored, starts + 1, True, 1)
        return stream, scored

    def _pair_starts(self, rng: np.random.Generator, batch_size: int, segments: int) -> np.ndarray:
        """Start positions of the pairs, ascending, spread evenly over all segments but the last: [b p]."""
        n, shown = self.segment_length, segments - 1
        counts = np.diff(np.arange(shown + 1) * self.num_pairs // shown)
        parts = [
            segment * n + place_blocks(rng, batch_size, count, 2, n)
            for segment, count in enumerate(counts.tolist())
        ]
        return np.concatenate(parts, 1)

    def solve(self, row: list[int]) -> list[int]:
        """At every key, predict the value that last followed it."""
        latest: dict[int, int] = {}
        predictions, previous = [], 0
        for token in row:
            if token in self.vocabulary["value"]:
                latest[previous] = token
            predictions.append(latest.get(token, 0))
            previous = token
        return predictions
