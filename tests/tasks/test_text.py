import json
import socket
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch

from memlib.config import TaskConfig, TextConfig
from memlib.tasks import Text, make_task
from memlib.tasks.corpus import read_corpus
from memlib.tasks.text import byte_name


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def text():
    return Text(TextConfig(max_bytes=20_000), segment_length=16, segments=2)


def test_rows_go_on_from_batch_to_batch(text):
    last = text.batches_per_epoch(4) - 1
    for step in (0, 1, last - 1):
        now, following = text.batch(4, step, seed=3), text.batch(4, step + 1, seed=3)
        assert torch.equal(now.targets[:, :-1], now.tokens[:, 1:])
        assert torch.equal(now.targets[:, -1], following.tokens[:, 0])
        assert now.starts.tolist() == [step == 0] * 4
        assert not following.starts.any()
    assert text.batch(4, last + 1, seed=3).starts.all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_epoch_reads_every_stretch_once(text, split):
    batches = text.batches_per_epoch(3, split)
    parts = [text.batch(3, step, split=split).tokens for step in range(batches)]
    rows = torch.cat(parts, 1).numpy().astype(np.uint8)
    ring = text.text[split].tobytes() * 2
    starts = sorted(ring.index(row.tobytes()) for row in rows)
    stretch = len(text.text[split]) // 3
    assert all(b - a >= stretch for a, b in pairwise(starts))
    assert rows.shape[1] > stretch - 2 * 32


def test_a_batch_is_a_function_of_seed_split_and_step(text):
    batch = text.batch(4, 2, seed=1)
    assert torch.equal(batch.tokens, text.batch(4, 2, seed=1).tokens)
    epoch = text.batches_per_epoch(4)
    for other in ({"seed": 2}, {"split": "test"}, {"step": 2 + epoch}):
        arguments = {"step": 2, "seed": 1} | other
        assert not torch.equal(batch.tokens, text.batch(4, **arguments).tokens)


def test_shapes_and_scores(text):
    batch = text.batch(4, 0)
    assert batch.tokens.shape == batch.scored.shape == (4, 32) and batch.scored.all()
    assert batch.tokens.dtype == torch.int64 and batch.tokens.max() < text.vocab_size == 256
    assert text.continues


def test_the_last_tenth_is_the_test_split(text):
    corpus = read_corpus(text.config)
    assert np.array_equal(text.text["test"], corpus[-2000:])
    assert np.array_equal(text.text["train"][:-1], corpus[:-2000]) and len(corpus) == 20_000


def test_chance_is_the_commonest_bytes_accuracy(text):
    counts = np.bincount(text.text["train"], minlength=256)
    assert text.name_of(int(counts.argmax())) == " "
    assert text.chance == pytest.approx((text.text["test"] == ord(" ")).mean())


def test_the_copying_reader_predicts_what_repeats(text):
    row = torch.tensor([list(b"the lamp. the lamp. the lamp.")])
    said = text.oracle(row)[0]
    assert torch.equal(said[14:-1], row[0, 15:])
    real = torch.from_numpy(text.text["test"][None, :1000].astype(np.int64))
    assert (text.oracle(real)[:, :-1] == real[:, 1:]).double().mean() > 0.3


def test_bytes_have_names():
    assert [byte_name(byte) for byte in (0, 10, 65, 32, 200)] == ["¶", "\\n", "A", " ", "\\xc8"]


def corpus_of(path, **options):
    return read_corpus(TextConfig(dataset=str(path), **options)).tobytes()


def test_text_files_are_documents(tmp_path):
    (tmp_path / "b.md").write_text("# two\nlines\n")
    (tmp_path / "a.txt").write_text("öne\0")
    (tmp_path / "c.py").write_text("three = 3\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("never")
    (tmp_path / "ignored.bin").write_bytes(b"never")
    assert corpus_of(tmp_path / "a.txt") == "öne\0".encode()
    assert corpus_of(tmp_path) == "öne\0# two\nlines\n\0three = 3\n\0".encode()


def test_tables_give_their_text_column(tmp_path):
    rows = [{"id": 1, "body": "one"}, {"id": 2, "body": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("id,body\n1,one\n2,two\n")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet"):
        assert corpus_of(tmp_path / name, text_field="body") == b"one\0two\0", name
    with pytest.raises(ValueError, match=r"text_field = 'text': .* has the columns id, body"):
        corpus_of(tmp_path / "c.csv")
    with pytest.raises(ValueError, match="text_field = 'id': holds int64"):
        corpus_of(tmp_path / "c.csv", text_field="id")


def test_long_texts_are_cut(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 5000)
    assert corpus_of(tmp_path / "a.txt", max_bytes=1000) == b"x" * 999 + b"\0"


def test_a_missing_file_an_empty_folder_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"dataset = 'nothing\.txt': no such file or folder"):
        corpus_of("nothing.txt")
    with pytest.raises(ValueError, match=r"nothing to read; known are \.txt"):
        corpus_of(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        corpus_of(tmp_path / "empty.txt")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"cannot be read; repair the file"):
        corpus_of(tmp_path / "broken.parquet")


def test_a_hub_dataset_is_looked_for_in_the_cache_only():
    before = (datasets.config.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled())
    with pytest.raises(ValueError, match=r"memlib/no-such-set.*download: true to fetch it"):
        corpus_of("memlib/no-such-set")
    assert before == (datasets.config.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled())


def test_too_little_text_and_segments_min_are_refused(text):
    with pytest.raises(ValueError, match="2000 bytes of test text are too few for 100 rows"):
        text.batch(100, 0, split="test")
    with pytest.raises(ValueError, match="split = 'valid'"):
        text.batch(1, 0, split="valid")
    with pytest.raises(ValueError, match="segments_min = 2: text rows continue"):
        make_task(TaskConfig(name="text", segments_min=2), 16)
