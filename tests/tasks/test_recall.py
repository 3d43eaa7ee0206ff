import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib.config import RecallConfig
from memlib.tasks import Recall


def pairs_of(task, row):
    """(segment, key, value) of every pair before the last segment; each must lie in one segment."""
    n, found = task.segment_length, []
    keys, values = task.vocabulary["key"], task.vocabulary["value"]
    for segment in range(task.segments - 1):
        tokens = row[segment * n : (segment + 1) * n]
        for i, token in enumerate(tokens):
            if token in keys:
                assert i + 1 < n and tokens[i + 1] in values
                found.append((segment, token, tokens[i + 1]))
            assert token not in values or tokens[i - 1] in keys
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.integers(3, 40),
    st.integers(0, 2),
    st.integers(0, 5),
    st.integers(0, 2**32),
    st.data(),
)
def test_pairs_and_queries_lie_whole_in_their_segments(n, more_segments, rewrites, seed, data):
    queries = data.draw(st.integers(1, n // 3))
    pairs = data.draw(st.integers(queries, 2 * (n // 2)))
    rewrites = min(rewrites, pairs, n // 2)
    config = RecallConfig(num_pairs=pairs, num_queries=queries, num_keys=max(2, pairs), rewrites=rewrites)
    home = -(-pairs // (n // 2))
    task = Recall(config, n, home + 1 + bool(rewrites) + more_segments)
    batch = task.batch(4, 0, seed=seed)
    for row, scored in zip(batch.tokens.tolist(), batch.scored.tolist(), strict=True):
        found = pairs_of(task, row)
        first, again = found[:pairs], found[pairs:]
        assert len({key for _, key, _ in first}) == pairs and len(again) == rewrites
        assert all(segment < home for segment, _, _ in first)
        assert all(segment >= home for segment, _, _ in again)
        shown = {key: value for _, key, value in first}
        assert all(value != shown[key] for _, key, value in again)
        last = row[-n:]
        asked = [i for i, token in enumerate(last) if token in task.vocabulary["query"]]
        assert [i for i, s in enumerate(scored[-n:]) if s] == [i + 1 for i in asked]
        assert len(asked) == queries
        assert all(last[i + 1] in shown for i in asked if i + 1 < n)


def test_the_first_value_is_wrong_for_rewritten_keys():
    task = Recall(RecallConfig(rewrites=2), 16, 4)
    batch = task.batch(256, 0)
    right = 0
    for row, targets, scored in zip(batch.tokens, batch.targets, batch.scored, strict=True):
        first: dict[int, int] = {}
        for _, key, value in pairs_of(task, row.tolist()):
            first.setdefault(key, value)
        asked = zip(row[scored].tolist(), targets[scored].tolist(), strict=True)
        right += sum(first[key] == target for key, target in asked)
    assert right == 256 * 2  # the two of four keys that were never rewritten


def test_pairs_stay_in_the_first_segment_where_they_fit():
    task = Recall(RecallConfig(num_pairs=5), 16, 4)
    for row in task.batch(32, 0).tokens.tolist():
        assert [segment for segment, _, _ in pairs_of(task, row)] == [0] * 5


def test_names_and_chance():
    task = Recall(RecallConfig(num_values=8), 16, 4)
    assert task.chance == 1 / 8
    row = task.batch(1, 0).tokens[0].tolist()
    names = "".join(task.name_of(token) for token in row)
    assert set(names) <= set(".?kv0123456789") and names.count("?") == 4
    assert torch.equal(task.batch(1, 0).tokens[0], torch.tensor(row))


@pytest.mark.parametrize(
    ("options", "n", "segments", "message"),
    [
        ({"num_pairs": 6}, 16, 4, "num_pairs = 6: queries take 3 tokens each and at most 5 fit"),
        (
            {"num_pairs": 9, "num_queries": 6},
            16,
            4,
            "num_queries = 6: queries take 3 tokens each and at most 5 fit",
        ),
        ({"num_pairs": 2, "num_queries": 3}, 16, 4, "num_queries = 3: at most num_pairs = 2"),
        ({"num_pairs": 17, "num_queries": 1}, 16, 4, "num_pairs = 17: at most num_keys = 16"),
        ({"num_pairs": 9, "num_queries": 1}, 16, 2, "segments = 2: these options need at least 3"),
        ({"rewrites": 1}, 16, 2, "segments = 2: these options need at least 3"),
        ({"rewrites": 5}, 16, 4, "rewrites = 5: at most 4"),
        ({}, 16, 1, "segments = 1: these options need at least 2"),
        ({"num_fillers": 250}, 16, 4, "vocabulary of 284 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(options, n, segments, message):
    with pytest.raises(ValueError, match=message):
        Recall(RecallConfig(**options), n, segments)
