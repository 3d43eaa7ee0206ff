"""The newest tokens and their mean, against plain loops over rows and tokens."""

import pytest
import torch

from memlib.ops import newest_tokens, newest_tokens_reference, rolling_mean, rolling_mean_reference

MASKS = {
    "whole": [1, 1, 1, 1, 1, 1],
    "left": [0, 0, 1, 1, 1, 1],
    "right": [1, 1, 1, 0, 0, 0],
    "gaps": [1, 0, 1, 1, 0, 1],
    "none": [0, 0, 0, 0, 0, 0],
}
HIDDEN = torch.randn(len(MASKS), 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.tensor(list(MASKS.values())).bool()


@pytest.mark.parametrize("newest", [None, 2])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_a_rolling_mean_is_the_mean_of_the_last_valid_tokens(window, newest):
    got = rolling_mean(HIDDEN, MASK, window, newest)
    torch.testing.assert_close(got, rolling_mean_reference(HIDDEN, MASK, window, newest))


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_the_newest_tokens_are_the_last_valid_ones_in_order(count):
    got, there = newest_tokens(HIDDEN, MASK, count)
    want, known = newest_tokens_reference(HIDDEN, MASK, count)
    assert torch.equal(got, want) and torch.equal(there, known)
