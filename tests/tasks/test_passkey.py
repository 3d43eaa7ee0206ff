import pytest

from memlib.config import PasskeyConfig
from memlib.tasks import Passkey, passkey_grid


def key_segments(task, batch_size=64):
    """The segment of each row's key; the mark and its digits must lie in one."""
    found = []
    for row in task.batch(batch_size, 0).tokens.tolist():
        (mark,) = [i for i, token in enumerate(row) if token in task.vocabulary["mark"]]
        digits = row[mark + 1 : mark + 1 + task.config.num_digits]
        assert all(token in task.vocabulary["digit"] for token in digits)
        segment = mark // task.segment_length
        assert (mark + task.config.num_digits) // task.segment_length == segment
        found.append(segment)
    return found


@pytest.mark.parametrize(("depth", "segment"), [(0, 0), (0.5, 2), (1, 4)])
def test_depth_chooses_the_segment(depth, segment):
    assert set(key_segments(Passkey(PasskeyConfig(depth=depth), 8, 6))) == {segment}


def test_without_depth_the_key_is_anywhere_before_the_last_segment():
    assert set(key_segments(Passkey(PasskeyConfig(), 8, 6))) == set(range(5))


def test_each_digit_is_asked_for():
    task = Passkey(PasskeyConfig(num_digits=3), 16, 3)
    batch = task.batch(16, 0)
    for row, targets, scored in zip(batch.tokens, batch.targets, batch.scored, strict=True):
        mark = row.tolist().index(task.vocabulary["mark"].start)
        assert targets[scored].tolist() == row[mark + 1 : mark + 4].tolist()
        assert task.name_of(int(row[scored][0])) == "?"


def test_the_grid_has_a_task_for_each_length_and_depth():
    grid = passkey_grid(PasskeyConfig(), 8, segments=(2, 5), depths=(0.0, 0.5, 1.0))
    assert set(grid) == {(length, depth) for length in (2, 5) for depth in (0.0, 0.5, 1.0)}
    assert set(key_segments(grid[5, 1.0])) == {3}
    assert grid[2, 0.5].batch(1, 0).tokens.shape == (1, 16)
    assert len({task.vocab_size for task in grid.values()}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_digits": 8}, "num_digits = 8: at most 7 fit after their mark"),
        ({"depth": 1.5}, "depth = 1.5: must be from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Passkey(PasskeyConfig(**options), 8, 4)
