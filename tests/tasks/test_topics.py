import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib.config import TopicsConfig
from memlib.tasks import Topics


def said(task, batch):
    """(row, segment, topic, key, value, scored) of every question in a batch."""
    n, names = task.segment_length, task.vocabulary
    for r, row in enumerate(batch.tokens.tolist()):
        for i, token in enumerate(row):
            if token in names["query"]:
                topic = (row[i // n * n] - names["word"].start) // task.config.num_words
                key, value = (
                    row[i + 1] - names["key"].start,
                    int(batch.targets[r, i + 1]) - names["value"].start,
                )
                yield r, i // n, topic, key, value, bool(batch.scored[r, i + 1])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(4, 9),
    st.integers(1, 4),
    st.integers(2, 4),
    st.integers(0, 99),
)
def test_a_stream_keeps_its_topic_and_its_facts(topics, words, keys, queries, segments, seed):
    config = TopicsConfig(
        num_topics=topics, num_words=words, num_keys=keys, num_values=7, num_queries=queries, facts_seed=seed
    )
    task = Topics(config, 16, segments)
    batch = task.batch(5, 0, seed=seed)
    found = list(said(task, batch))
    assert len(found) == 5 * segments * queries
    assert all(value == task.facts[topic, key] for _, _, topic, key, value, _ in found)
    assert all(scored == (segment > 0) for _, segment, *_, scored in found)
    assert int(batch.scored.sum()) == 5 * (segments - 1) * queries
    for r in range(5):
        assert len({topic for row, _, topic, *_ in found if row == r}) == 1
        for s in range(segments):
            asked = [key for row, segment, _, key, *_ in found if (row, segment) == (r, s)]
            assert len(asked) == len(set(asked)) == queries


def test_facts_are_of_the_corpus_and_not_of_the_split_or_seed():
    task = Topics(TopicsConfig(), 16, 3)
    assert np.array_equal(task.facts, Topics(TopicsConfig(), 32, 5).facts)
    assert not np.array_equal(task.facts, Topics(TopicsConfig(facts_seed=1), 16, 3).facts)
    for seed, split in ((0, "train"), (7, "test")):
        found = said(task, task.batch(16, 0, seed, split))
        assert all(value == task.facts[topic, key] for _, _, topic, key, value, _ in found)


def test_chance_is_to_know_the_facts_but_not_the_topic():
    """Each key has another value in each topic, so the best of those guesses is right once in num_topics."""
    task = Topics(TopicsConfig(num_topics=4), 16, 3)
    assert all(len(set(values)) == 4 for values in task.facts.T.tolist())
    right, found = 0, list(said(task, task.batch(512, 0)))
    for *_, key, value, _ in found:
        right += value == task.facts[0, key]
    assert abs(right / len(found) - task.chance) < 0.06 and task.chance == 1 / 4


@pytest.mark.parametrize(("change", "least", "most"), [(0.0, 0.0, 0.0), (0.5, 0.45, 0.55), (1.0, 1.0, 1.0)])
def test_topics_change_as_often_as_said(change, least, most):
    task = Topics(TopicsConfig(change=change), 16, 5)
    batch = task.batch(256, 0)
    topics = np.array([task.topic_of(row) for row in batch.tokens.tolist()])
    assert least <= (topics[:, 1:] != topics[:, :-1]).mean() <= most
    assert torch.equal(task.oracle(batch.tokens)[batch.scored], batch.targets[batch.scored])


@pytest.mark.parametrize(
    ("changes", "n", "message"),
    [
        ({"num_topics": 20}, 16, "num_topics = 20: at most num_values = 16"),
        ({"num_keys": 3}, 16, "num_queries = 4: at most num_keys = 3"),
        ({"num_queries": 6}, 16, "num_queries = 6: they take 3 tokens each .* at most 5 fit"),
    ],
)
def test_what_does_not_fit_is_refused(changes, n, message):
    with pytest.raises(ValueError, match=message):
        Topics(TopicsConfig(**changes), n, 3)


def test_a_batch_is_a_function_of_seed_split_and_step():
    task, again = (Topics(TopicsConfig(change=0.3), 16, 4, 2) for _ in range(2))
    batch = task.batch(8, 3, seed=5)
    assert torch.equal(batch.tokens, again.batch(8, 3, seed=5).tokens)
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    test = task.batch(8, 3, seed=5, split="test").tokens
    for other in (task.batch(8, 4, seed=5).tokens, task.batch(8, 3, seed=6).tokens, test):
        assert other.shape != batch.tokens.shape or not torch.equal(other, batch.tokens)
    assert {task.batch(2, step).tokens.shape[1] for step in range(20)} == {32, 48, 64}
