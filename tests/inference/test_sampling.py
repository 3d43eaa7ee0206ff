"""Sampling: held to naive loops, to exact distributions, and to draws that are counted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memlib.inference.sampling import choose, keep_top_k, keep_top_p, probabilities, seeded

ROWS = st.lists(st.integers(-40, 40), min_size=1, max_size=12).map(lambda row: [x / 8 for x in row])


def softmax(row):
    high = max(row)
    total = sum(math.exp(x - high) for x in row)
    return [math.exp(x - high) / total for x in row]


def naive_top_k(row, k):
    least = sorted(row, reverse=True)[min(k, len(row)) - 1]
    return [x if x >= least else -math.inf for x in row]


def naive_top_p(row, p):
    """The most probable tokens, one after another, until they sum to p."""
    chance, total, kept = softmax(row), 0.0, set()
    for token in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if total >= p:
            break
        kept.add(token)
        total += chance[token]
    return [x if i in kept else -math.inf for i, x in enumerate(row)]


def double(row):
    return torch.tensor([row], dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 14))
def test_top_k_is_the_loop(row, k):
    assert keep_top_k(double(row), k)[0].tolist() == naive_top_k(row, k)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 32))
def test_top_p_is_the_loop(row, p):
    p = p / 32 - 1e-9  # no sum of probabilities falls on the border, where rounding decides
    assert keep_top_p(double(row), p)[0].tolist() == naive_top_p(row, p)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([0.25, 1.0, 3.0]), st.integers(1, 12), st.sampled_from([0.31, 0.77, 1.0]))
def test_temperature_comes_first_then_top_k_then_top_p(row, temperature, k, p):
    hot = [x / temperature for x in row]
    left = naive_top_p(naive_top_k(hot, k), p - 1e-9)
    got = probabilities(double(row), temperature, k, p)[0]
    torch.testing.assert_close(got, double(softmax(left))[0])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.sampled_from([0.25, 1.0, 3.0]), st.integers(1, 12), st.sampled_from([0.31, 0.77, 0.95]))
def test_the_same_as_transformers_processors(peer, row, temperature, k, p):
    """temperature, top-k, top-p, in the order in which its `generate` applies them."""
    hf = peer("transformers.generation.logits_process")
    row = [x + 1e-3 * i * i for i, x in enumerate(row)]  # of equals theirs keeps the last, ours the first
    want = hf.TemperatureLogitsWarper(temperature)(None, double(row))
    want = hf.TopKLogitsWarper(k)(None, want)
    want = torch.softmax(hf.TopPLogitsWarper(p)(None, want), -1)
    torch.testing.assert_close(probabilities(double(row), temperature, k, p), want)


def test_the_order_matters():
    """The wrong order, top-p before temperature, keeps other tokens here."""
    row = double([2.0, 1.0, 0.0])
    assert (probabilities(row, 4.0, None, 0.6) > 0).sum() == 2
    assert (torch.softmax(keep_top_p(row, 0.6) / 4.0, -1) > 0).sum() == 1


def test_a_row_of_top_p_keeps_at_least_one_and_of_one_keeps_all():
    row = torch.tensor([[0.0, 9.0, 1.0]])
    assert (keep_top_p(row, 1e-9) > -torch.inf).tolist() == [[False, True, False]]
    assert torch.equal(keep_top_p(row.double(), 1.0), row.double())


def test_temperature_zero_is_the_limit_of_small_ones():
    logits = torch.randn(5, 9, generator=seeded("limit"))
    exact = probabilities(logits, 0.0)
    assert torch.equal(exact.argmax(-1), logits.argmax(-1)) and torch.equal(exact.sum(-1), torch.ones(5))
    for temperature in (1e-4, 1e-30, 1e-44):
        torch.testing.assert_close(probabilities(logits, temperature), exact)
    assert torch.equal(choose(logits, 0.0, None, None, [None] * 5), logits.argmax(-1))


@pytest.mark.parametrize("options", [(1.0, None, None), (0.5, None, None), (2.0, 4, None), (1.0, None, 0.8)])
def test_draws_follow_the_distribution(options):
    """20,000 draws: every frequency within five standard errors, and nothing that was excluded."""
    count = 20_000
    logits = torch.randn(1, 8, generator=seeded("row"))
    expected = probabilities(logits, *options)[0]
    drawn = choose(logits.expand(count, -1), *options, [seeded("draws")] * count)
    share = torch.bincount(drawn, minlength=8) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert bool(((share - expected).abs() <= 5 * error).all())
    other = probabilities(logits, 1.3)[0]  # the test can fail: another temperature is told apart
    assert bool(((share - other).abs() > 5 * error).any())


def test_a_row_with_its_own_generator_does_not_depend_on_the_others():
    logits = torch.randn(3, 50, generator=seeded("rows"))
    together = choose(logits, 1.0, None, None, [seeded(row) for row in range(3)])
    alone = [choose(logits[row : row + 1], 1.0, None, None, [seeded(row)]) for row in range(3)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_names_seed_the_same_everywhere_and_apart():
    def first(*names):
        return int(torch.randint(2**40, (1,), generator=seeded(*names)))

    assert first(0, "ann") == first(0, "ann")
    assert (
        len({first(0, "ann"), first(1, "ann"), first(0, "bob"), first("0", "ann"), first(0, "ann", 1)}) == 5
    )
