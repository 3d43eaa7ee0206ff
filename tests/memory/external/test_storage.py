"""A store on disk: what was saved comes back, and nothing else is taken for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

import memlib.files
from memlib.config import IndexConfig
from memlib.memory.external.index import LEAST
from memlib.memory.external.storage import open_store, save_store
from memlib.memory.external.store import Shape, Store, StoreError

H, K, V = 2, 4, 3
PLACES = ("store.json", "rows-000001.safetensors", "tables-000001.safetensors")


def items(m, seed=0, dim=K):
    drawn = torch.randn(H, m, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=-1)


def grown(store, stream, m, seed):
    """Write m rows at the end of a stream; a stream that does not exist is begun."""
    while store.next_stream <= stream:
        store.new_stream()
    length = store.streams[stream].length if stream in store.streams else 0
    store.append(stream, length, items(m, seed), items(m, seed + 1, V))


def sample(shape=None, rows=(5, 3), **index):
    store = Store(shape or Shape(H, K, V), IndexConfig(**index))
    store.note_encoder(items(2, seed=99))
    for stream, m in enumerate(rows):
        grown(store, stream, m, seed=10 * stream)
    return store


def contents(store):
    """All that a store can answer, as plain values."""
    found = {"next": store.next_stream, "encoders": [e.tolist() for e in store.encoders]}
    for number, stream in store.streams.items():
        rows = len(stream.serial)
        found[number] = {
            "length": (stream.length, stream.forgotten),
            **{n: getattr(stream, n).rows(0, rows).tolist() for n in ("keys", "values")},
            **{n: getattr(stream, n).newest.tolist() for n in ("serial", "gone", "retrieved", "encoder")},
            "means": stream.means.rows(0, len(stream.means)).tolist(),
        }
    return found


SHAPES = {
    "plain": Shape(H, K, V),
    "bounded": Shape(H, K, V, capacity=4),
    "least_retrieved": Shape(H, K, V, capacity=4, eviction="least_retrieved"),
    "chunks": Shape(H, K, V, chunk=2),
    "float64": Shape(H, K, V, dtype="float64"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_what_is_saved_comes_back_and_goes_on_over_many_saves(tmp_path, shape):
    store = sample(shape)
    for round_ in range(20):
        save_store(store, tmp_path / "store")
        opened = open_store(tmp_path / "store")
        assert contents(opened) == contents(store)
        for one in (store, opened):
            grown(one, round_ % 3, 1 + round_ % 2, seed=100 + round_)
        assert contents(opened) == contents(store)
        query = items(2, seed=round_)
        for number, stream in store.streams.items():
            for mine, theirs in zip(
                store.search(number, stream.length, query, 2),
                opened.search(number, stream.length, query, 2),
                strict=True,
            ):
                assert torch.equal(mine, theirs)
        if round_ % 3 == 2:
            store = opened  # go on with what was opened


def test_rows_stay_on_disk_until_they_are_read(tmp_path):
    save_store(sample(), tmp_path / "store")
    opened = open_store(tmp_path / "store")
    stream = opened.streams[0]
    assert len(stream.keys) == 5 and stream.keys.filled == 0 and len(stream.keys.mapped) == 1
    grown(opened, 0, 2, seed=7)
    assert len(stream.keys) == 7 and stream.keys.filled == 2


def test_a_save_writes_only_what_is_new_and_leaves_no_litter(tmp_path):
    store = sample(rows=(3000,))
    save_store(store, tmp_path / "store")
    first = (tmp_path / "store" / PLACES[1]).stat()
    grown(store, 0, 1, seed=5)
    (tmp_path / "store" / "rows-000002.safetensors.123.part").write_bytes(b"of a killed save")
    save_store(store, tmp_path / "store")
    again = (tmp_path / "store" / PLACES[1]).stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert sorted(os.listdir(tmp_path / "store")) == [
        "rows-000001.safetensors",
        "rows-000002.safetensors",
        "store.json",
        "tables-000002.safetensors",
    ]
    assert (tmp_path / "store" / "rows-000002.safetensors").stat().st_size < 500


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_comes_back_as_it_was(tmp_path, kind):
    store, query = sample(rows=(2 * LEAST + 9,), kind=kind, exact_below=0), items(6, seed=3)
    want = store.search(0, 2 * LEAST + 9, query, 5)
    save_store(store, tmp_path / "store")
    opened = open_store(tmp_path / "store")
    assert bool(opened.streams[0].indexes) == (kind != "flat")  # a flat one is built in no time
    for mine, theirs in zip(want, opened.search(0, 2 * LEAST + 9, query, 5), strict=True):
        assert torch.equal(mine, theirs)
    other = open_store(tmp_path / "store", IndexConfig(kind="flat", exact_below=0))
    assert not other.streams[0].indexes and other.index.kind == "flat"


class Killed(BaseException):
    pass


class Disk:
    """os, as far as `write_bytes` uses it, dying after a number of steps: a byte or a rename is one."""

    def __init__(self, steps):
        self.left = steps

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, handle, data):
        done = os.write(handle, data[: self.left])
        self.left -= done
        if done < len(data):
            raise Killed
        return done

    def replace(self, old, new):
        if self.left <= 0:
            raise Killed
        self.left -= 1
        os.replace(old, new)


@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_byte_of_a_save_leaves_a_whole_version(tmp_path, monkeypatch, stride):
    """And a save that is tried again afterwards succeeds."""
    store = sample(rows=(2,))
    save_store(store, tmp_path / "before")
    before = contents(store)
    steps, versions = 0, []
    while True:
        folder = tmp_path / f"at-{steps}"
        shutil.copytree(tmp_path / "before", folder)
        store = open_store(folder)
        grown(store, 0, 1, seed=3)
        after = contents(store)
        with monkeypatch.context() as patched:
            patched.setattr(memlib.files, "os", disk := Disk(steps))
            try:
                save_store(store, folder)
            except Killed:
                pass
            else:
                break
        found = contents(open_store(folder))
        versions.append(found == after)
        assert found == (after if versions[-1] else before)
        if steps % 10 == 0:
            save_store(store, folder)
            assert contents(open_store(folder)) == after
        shutil.rmtree(folder)
        steps += stride
    assert disk.left < stride and steps > 1000
    assert versions == sorted(versions)


CHILD = """
import sys
from tests.memory.external.test_storage import grown, open_store, save_store
store = open_store(sys.argv[1])
for i in range(10**6):
    grown(store, i % 3, 40, seed=i)
    save_store(store, sys.argv[1])
    print(sum(s.length for s in store.streams.values()), flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing_it_had_saved(tmp_path):
    save_store(sample(), tmp_path / "store")
    for delay in (0.3, 0.37, 0.45):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        said = [child.stdout.readline()]
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        said += child.communicate()[0].splitlines()
        opened = open_store(tmp_path / "store")
        length = sum(stream.length for stream in opened.streams.values())
        assert length >= max(int(line) for line in said if line.strip())
        for number, stream in opened.streams.items():
            assert opened.search(number, stream.length, items(1), 1).serial.max() >= 0


@pytest.mark.parametrize("name", PLACES)
def test_a_cut_file_is_refused_at_every_length(tmp_path, name):
    save_store(sample(rows=(1,)), tmp_path / "store")
    path = tmp_path / "store" / name
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=f"{name}: (damaged|{length} bytes, not {len(whole)}).*restore"):
            open_store(tmp_path / "store")


@pytest.mark.parametrize("name", PLACES)
def test_an_altered_byte_is_refused_wherever_it_is(tmp_path, name):
    save_store(sample(rows=(1,)), tmp_path / "store")
    path = tmp_path / "store" / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        if whole[place : place + 1].isspace():
            continue  # JSON's white space says nothing
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(StoreError, match=f"{name}: (damaged|altered|.* bytes, not)|missing"):
            open_store(tmp_path / "store")


@pytest.mark.parametrize("name", PLACES)
def test_a_missing_file_is_named(tmp_path, name):
    save_store(sample(), tmp_path / "store")
    (tmp_path / "store" / name).unlink()
    with pytest.raises(StoreError, match=f"{name}"):
        open_store(tmp_path / "store")


def test_no_store_is_overwritten_by_another(tmp_path):
    save_store(sample(), tmp_path / "store")
    with pytest.raises(StoreError, match="holds a store; open it with open_store"):
        save_store(sample(), tmp_path / "store")
    one, two = (open_store(tmp_path / "store") for _ in range(2))
    grown(one, 0, 1, seed=1)
    save_store(one, tmp_path / "store")
    with pytest.raises(StoreError, match="saved by another process since it was opened"):
        save_store(two, tmp_path / "store")
    save_store(two, tmp_path / "elsewhere")
    assert contents(open_store(tmp_path / "elsewhere")) == contents(two)
    assert contents(open_store(tmp_path / "store")) == contents(one)
