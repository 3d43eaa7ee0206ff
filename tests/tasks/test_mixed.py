import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib.config import MixedConfig
from memlib.tasks import Mixed


def shown(task, row):
    """(position, key, value) of every pair before the last segment."""
    n, last = task.segment_length, (task.segments - 1) * task.segment_length
    keys = (*task.vocabulary["fact"], *task.vocabulary["register"])
    pairs = [(i, row[i], row[i + 1]) for i in range(last) if row[i] in keys]
    assert all(i % n + 1 < n and value in task.vocabulary["value"] for i, _, value in pairs)
    return pairs


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2**32))
def test_facts_once_registers_again_and_the_last_value_counts(facts, registers, settings_, more, seed):
    config = MixedConfig(
        num_facts=facts,
        num_registers=registers,
        num_settings=settings_,
        fact_queries=min(facts, 3),
        register_queries=min(registers, 2),
    )
    pairs = facts + registers * settings_
    task = Mixed(config, 16, 1 + -(-pairs // 8) + more)
    batch = task.batch(4, 0, seed=seed)
    for row, targets, scored in zip(batch.tokens.tolist(), batch.targets, batch.scored, strict=True):
        found = shown(task, row)
        keys = [key for _, key, _ in found]
        assert len(found) == pairs
        assert all(keys.count(k) == settings_ for k in task.vocabulary["register"])
        assert len({k for k in keys if k in task.vocabulary["fact"]}) == facts
        by_segment = [sum(i // 16 == s for i, _, _ in found) for s in range(task.segments - 1)]
        assert max(by_segment) - min(by_segment) <= 1
        latest = {key: value for _, key, value in found}
        asked = scored.nonzero().flatten().tolist()
        assert len(asked) == config.fact_queries + config.register_queries
        assert len({row[i] for i in asked}) == len(asked)
        assert all(row[i - 1] in task.vocabulary["query"] for i in asked)
        assert [int(targets[i]) for i in asked] == [latest[row[i]] for i in asked]


def test_the_first_value_of_a_register_is_as_good_as_a_guess():
    task = Mixed(MixedConfig(num_registers=4, register_queries=4, fact_queries=0), 32, 4)
    batch, right = task.batch(256, 0), 0
    for row, targets, scored in zip(batch.tokens.tolist(), batch.targets, batch.scored, strict=True):
        first: dict[int, int] = {}
        for _, key, value in shown(task, row):
            first.setdefault(key, value)
        right += sum(first[row[i]] == int(targets[i]) for i in scored.nonzero().flatten().tolist())
    assert abs(right / 1024 - task.chance) <= 4 * (task.chance / 1024) ** 0.5


@pytest.mark.parametrize(
    ("changes", "n", "message"),
    [
        ({"num_facts": 40}, 32, "num_facts = 40: at most 32"),
        ({"fact_queries": 20}, 32, "fact_queries = 20: at most 16"),
        ({"register_queries": 5}, 32, "register_queries = 5: at most 4"),
        ({}, 8, r"fact_queries \+ register_queries = 5: they take 3 tokens each and at most 2 fit"),
        ({"num_settings": 10}, 32, "segments = 4: these options need at least 5"),
    ],
)
def test_what_does_not_fit_is_refused(changes, n, message):
    with pytest.raises(ValueError, match=message):
        Mixed(MixedConfig(**changes), n, 4)


def test_the_oracle_reads_both_kinds():
    task = Mixed(MixedConfig(), 32, 4)
    batch = task.batch(32, 0)
    assert torch.equal(task.oracle(batch.tokens)[batch.scored], batch.targets[batch.scored])
