"""Rows of data sets: each once an epoch, and a resumed stream equals one that was never interrupted."""

import json
import socket
from itertools import islice, pairwise

import datasets
import pytest

from memlib.config import SourceConfig
from memlib.tasks.row_stream import RowStream

ROWS = [{"id": i, "turns": [{"role": "user", "content": f"number {i} é"}] * (i % 3 + 1)} for i in range(23)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=["jsonl", "parquet", "folder"])
def path(request, tmp_path):
    """The same rows in one file, and in a folder of two."""
    folder = tmp_path / "rows"
    folder.mkdir()
    if request.param == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
        return folder / "a.parquet"
    cuts = {"jsonl": [0, 23], "folder": [0, 9, 23]}[request.param]
    for i, (start, end) in enumerate(pairwise(cuts)):
        (folder / f"{i}.jsonl").write_text("\n".join(map(json.dumps, ROWS[start:end])))
    return folder if request.param == "folder" else folder / "0.jsonl"


MODES = [{}, {"streaming": True, "block": 5}, {"streaming": True, "block": 1000}]


@pytest.mark.parametrize("options", MODES)
def test_an_epoch_yields_every_row_once_in_another_order(path, options):
    rows = list(RowStream(SourceConfig(dataset=str(path), **options), "data", epochs=2))
    assert len(rows) == 46
    for epoch in (rows[:23], rows[23:]):
        assert sorted(epoch, key=lambda row: row["id"]) == ROWS
        assert epoch != ROWS
    assert rows[:23] != rows[23:]
    other = list(RowStream(SourceConfig(dataset=str(path), **options), "data", seed=1, epochs=1))
    assert other != rows[:23]


def test_a_block_of_a_stream_is_shuffled_in_itself(path):
    rows = list(RowStream(SourceConfig(dataset=str(path), streaming=True, block=5), "data", epochs=1))
    orders = set()
    for start in range(0, 23, 5):
        block = [row["id"] for row in rows[start : start + 5]]
        assert sorted(block) == list(range(start, min(start + 5, 23)))
        orders.add(tuple(number - start for number in block))
    assert len(orders) == 5, "each block has an order of its own"


@pytest.mark.parametrize("options", MODES)
def test_a_resumed_stream_is_an_uninterrupted_one(path, options):
    def fresh(epochs=3):
        return RowStream(SourceConfig(dataset=str(path), **options), "data", seed=4, epochs=epochs)

    whole = list(fresh())
    again = fresh()
    for read in (0, 1, 4, 5, 6, 22, 23, 24, 28, 46, 60, 69):
        stream = fresh()
        assert list(islice(stream, read)) == whole[:read]
        state = json.loads(json.dumps(stream.state_dict()))
        assert list(stream) == whole[read:], "reading a state changes nothing"
        for resumed in (fresh(), again):  # a new stream, and one that was elsewhere
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert list(resumed) == whole[read:], read
    assert next(iter(fresh(epochs=None))) == whole[0]


@pytest.mark.parametrize(
    ("saved", "opened", "complaint"),
    [
        ({"seed": 1}, {"seed": 2}, "seed = 1, not 2"),
        ({"streaming": True}, {}, "streaming = True, not False"),
        ({"streaming": True, "block": 5}, {"streaming": True, "block": 6}, "block_size = 5, not 6"),
    ],
)
def test_a_position_of_another_order_is_refused(path, saved, opened, complaint):
    def stream(seed=0, **options):
        return RowStream(SourceConfig(dataset=str(path), **options), "data", seed)

    with pytest.raises(ValueError, match=f"data: the saved position has {complaint}; continue with"):
        stream(**opened).load_state_dict(stream(**saved).state_dict())


def test_a_position_in_other_data_is_refused(tmp_path):
    for name, rows in (("a.jsonl", ROWS), ("b.jsonl", ROWS[1:])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    one, other = (RowStream(SourceConfig(dataset=str(tmp_path / n)), "data") for n in ("a.jsonl", "b.jsonl"))
    with pytest.raises(ValueError, match="block_size = 23, not 22"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_broken_and_empty_data_are_named(tmp_path, streaming):
    def opened(name):
        return RowStream(SourceConfig(dataset=str(tmp_path / name), streaming=streaming), "data")

    with pytest.raises(ValueError, match=r"data\.dataset = '.*none\.jsonl': no such file or folder"):
        opened("none.jsonl")
    with pytest.raises(ValueError, match=r"nothing to read; known are \.txt"):
        opened(".")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"data\.dataset = '.*broken\.parquet': cannot be read; repair"):
        opened("broken.parquet")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"data\.dataset = '.*broken\.jsonl': cannot be read; repair"):
        opened("broken.jsonl")
    datasets.Dataset.from_dict({"id": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"holds no rows; choose another|corresponds to no data"):
        opened("empty.parquet")


def test_a_folder_of_two_types_is_read_whole_but_not_as_a_stream(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    datasets.Dataset.from_list(ROWS[1:]).to_parquet(tmp_path / "b.parquet")
    assert len(list(RowStream(SourceConfig(dataset=str(tmp_path)), "data", epochs=1))) == 23
    with pytest.raises(ValueError, match=r"types json, parquet, .* set data\.streaming: false"):
        RowStream(SourceConfig(dataset=str(tmp_path), streaming=True), "data")


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({}, r"data\.download: true to fetch it"), ({"streaming": True}, r"set data\.download: true")],
)
def test_a_hub_dataset_is_not_fetched_unless_allowed(options, remedy):
    with pytest.raises(ValueError, match=rf"data\.dataset = 'memlib/no-such-set'.*{remedy}"):
        RowStream(SourceConfig(dataset="memlib/no-such-set", **options), "data")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_download_offline_is_refused_at_once(monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = SourceConfig(dataset="memlib/no-such-set", download=True, streaming=streaming)
    with pytest.raises(ValueError, match="could not be fetched; check the name"):
        RowStream(config, "data")
