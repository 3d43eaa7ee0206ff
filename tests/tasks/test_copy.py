import pytest

from memlib.config import CopyConfig
from memlib.tasks import Copy


def symbols_before(task, row):
    """(position, symbol) before the last segment."""
    until = (task.segments - 1) * task.segment_length
    return [(i, token) for i, token in enumerate(row[:until]) if token in task.vocabulary["symbol"]]


@pytest.mark.parametrize("selective", [False, True])
def test_the_symbols_are_asked_for_in_order(selective):
    task = Copy(CopyConfig(num_items=5, selective=selective), 12, 3)
    batch = task.batch(64, 0)
    for row, targets, scored in zip(batch.tokens, batch.targets, batch.scored, strict=True):
        shown = symbols_before(task, row.tolist())
        assert targets[scored].tolist() == [symbol for _, symbol in shown]
        assert task.name_of(int(row[scored][0])) == ">"


def test_copy_shows_a_run_in_the_first_segment():
    task = Copy(CopyConfig(num_items=5), 12, 3)
    starts = set()
    for row in task.batch(64, 0).tokens.tolist():
        where = [i for i, _ in symbols_before(task, row)]
        assert where == list(range(where[0], where[0] + 5)) and where[-1] < 12
        starts.add(where[0])
    assert starts == set(range(8))


def test_selective_copy_scatters_over_all_segments_but_the_last():
    task = Copy(CopyConfig(num_items=5, selective=True), 12, 3)
    rows = task.batch(256, 0).tokens.tolist()
    assert {i for row in rows for i, _ in symbols_before(task, row)} == set(range(24))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_items = 12: at most 11 fit after their mark"):
        Copy(CopyConfig(num_items=12), 12, 3)
