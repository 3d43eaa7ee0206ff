import pytest

from memlib.training.log import RunLog, read_log


def write(folder, step, records):
    with RunLog(folder, step) as log:
        for number in records:
            log.write(number, loss=number / 10)


def test_records_are_read_back_in_order(tmp_path):
    write(tmp_path, 0, [1, 2])
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]


def test_steps_after_the_checkpoint_are_dropped_when_a_run_goes_on(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    write(tmp_path, 2, [3])
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path, cut):
    write(tmp_path, 0, [1, 2])
    file = tmp_path / "log.jsonl"
    file.write_text(file.read_text()[:-cut])
    assert [record["step"] for record in read_log(tmp_path)] == ([1, 2] if cut == 1 else [1])
    write(tmp_path, 1, [2])
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
