import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlib.tasks.placement import place_blocks, random_subset, write_blocks


@given(st.data(), st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**32))
def test_blocks_are_ascending_disjoint_and_inside(data, width, blocks, seed):
    room = data.draw(st.integers(max(1, blocks * width), blocks * width + 20))
    starts = place_blocks(np.random.default_rng(seed), 7, blocks, width, room)
    assert starts.shape == (7, blocks)
    assert (np.diff(starts) >= width).all()
    assert (starts >= 0).all() and (starts + width <= room).all()


def test_every_placement_is_equally_likely():
    starts = place_blocks(np.random.default_rng(0), 6000, 2, 2, 6)
    placements, counts = np.unique(starts, axis=0, return_counts=True)
    assert len(placements) == 6
    assert (abs(counts - 1000) < 4 * np.sqrt(6000 / 6 * 5 / 6)).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 blocks of 4 tokens: at most 2 fit in 11 tokens"):
        place_blocks(np.random.default_rng(0), 1, 3, 4, 11)


def test_subsets_are_distinct_and_in_random_order():
    subset = random_subset(np.random.default_rng(0), 1000, 3, 5)
    assert all(len(set(row)) == 3 for row in subset.tolist())
    assert set(subset[:, 0]) == set(range(5))


def test_blocks_are_written_where_they_belong():
    stream = np.zeros((2, 6), dtype=int)
    write_blocks(stream, np.array([[0, 4], [1, 3]]), np.arange(1, 9).reshape(2, 2, 2))
    assert stream.tolist() == [[1, 2, 0, 0, 3, 4], [0, 5, 6, 7, 8, 0]]
