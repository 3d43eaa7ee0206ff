"""Streams about topics: each topic has its own facts, which never change.

Axes: b batch (streams), s segments, n tokens of a segment.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange, repeat

from memlib.config import TopicsConfig
from memlib.tasks.base import GeneratedTask
from memlib.tasks.placement import place_blocks, random_subset, write_blocks
from memlib.tasks.vocabulary import Vocabulary, numbered


class Topics(GeneratedTask):
    """`t2b ? k5 v9 t2a ? k1 v3 | t2a t2c ? k1 v3 ? k7 v0`: queries for learned facts.

    A stream is about one topic, and each segment begins with one of the topic's words. With `change` above
    0 the topic may change between segments. The value of a key depends only on the topic: `facts[topic, key]`
    is drawn once from `facts_seed` and is the same in training and test. So the facts must be learned, and a
    model that has learned them needs only the topic. The scored positions are the queried keys of every
    segment but the first, so that a router that uses the previous segment has seen the topic.

    For each key the topics' values are distinct. A model that knows every fact but not the topic is right
    one time in num_topics: that is `chance`. Without facts it is right one time in num_values.

    Raises ValueError if there are fewer values than topics, or if the queries do not fit into a segment.
    """

    def __init__(
        self,
        config: TopicsConfig,
        segment_length: int,
        segments: int = 4,
        segments_min: int | None = None,
    ) -> None:
        n, c = segment_length, config
        if c.num_topics > c.num_values:
            raise ValueError(
                f"num_topics = {c.num_topics}: at most num_values = {c.num_values}, because a key has a "
                "different value in each topic; raise num_values"
            )
        if c.num_queries > c.num_keys:
            raise ValueError(f"num_queries = {c.num_queries}: at most num_keys = {c.num_keys}; lower it")
        if 1 + 3 * c.num_queries > n:
            raise ValueError(
                f"num_queries = {c.num_queries}: they take 3 tokens each after a word of the topic, and at "
                f"most {(n - 1) // 3} fit in a segment_length of {n}; lower it or raise segment_length"
            )
        super().__init__(segment_length, segments, segments_min)
        self.config = config
        self.chance = 1 / c.num_topics
        self.vocabulary = Vocabulary(
            {
                "pad": ["_"],
                "query": ["?"],
                "word": [f"t{t}{chr(97 + w)}" for t in range(c.num_topics) for w in range(c.num_words)],
                "key": numbered("k", c.num_keys),
                "value": numbered("v", c.num_values),
            }
        )
        rng = np.random.default_rng(c.facts_seed)
        self.facts = rearrange(
            random_subset(rng, c.num_keys, c.num_topics, of=c.num_values), "key topic -> topic key"
        )

    def generate(
        self, rng: np.random.Generator, batch_size: int, segments: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, n, c = batch_size * segments, self.segment_length, self.config
        word, key, value = (self.vocabulary[f].start for f in ("word", "key", "value"))
        topic = rearrange(self.draw_topics(rng, batch_size, segments), "b s -> (b s) 1")
        parts = word + c.num_words * topic + rng.integers(0, c.num_words, (rows, n))

        asked = random_subset(rng, rows, c.num_queries, of=c.num_keys)
        starts = 1 + place_blocks(rng, rows, c.num_queries, 3, n - 1)
        mark = np.full_like(asked, self.vocabulary["query"].start)
        write_blocks(parts, starts, np.stack((mark, key + asked, value + self.facts[topic, asked]), -1))
        scored = np.zeros((rows, n), dtype=bool)
        np.put_along_axis(scored, starts + 1, True, 1)

        stream = rearrange(parts, "(b s) n -> b (s n)", s=segments)
        scored = rearrange(scored, "(b s) n -> b (s n)", s=segments)
        scored[:, :n] = False
        return np.concatenate((stream, np.zeros((batch_size, 1), dtype=stream.dtype)), 1), scored

    def draw_topics(self, rng: np.random.Generator, batch_size: int, segments: int) -> np.ndarray:
        """Draw the topic of each segment: [b s]; it changes between segments with probability `change`."""
        c = self.config
        first = rng.integers(0, c.num_topics, (batch_size, 1))
        if c.change == 0 or c.num_topics == 1:
            return repeat(first, "b 1 -> b s", s=segments)
        steps = rng.integers(1, c.num_topics, (batch_size, segments))
        steps *= rng.random((batch_size, segments)) < c.change
        return (first + np.cumsum(steps, 1)) % c.num_topics

    def topic_of(self, row: list[int]) -> list[int]:
        """The topic of each segment of a row, read from the segment's first word."""
        words = row[:: self.segment_length]
        return [(word - self.vocabulary["word"].start) // self.config.num_words for word in words]

    def solve(self, row: list[int]) -> list[int]:
        """At every key, predict its value in the segment's topic."""
        key, value, topics = self.vocabulary["key"], self.vocabulary["value"], self.topic_of(row)
        return [
            value.start + int(self.facts[topics[t // self.segment_length], token - key.start])
            if token in key
            else 0
            for t, token in enumerate(row)
        ]
