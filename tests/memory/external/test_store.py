"""The store against a plain Python model of it, and against naive search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from memlib.config import IndexConfig
from memlib.memory.external.index import LEAST
from memlib.memory.external.stale import stale_keys
from memlib.memory.external.store import Shape, Store, StoreError
from memlib.ops import TIE

H, K, V = 2, 4, 3


def items(m, seed=0, dim=K):
    drawn = torch.randn(H, m, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=-1)


def store(capacity=None, **options):
    index = {key: options.pop(key) for key in ("kind", "exact_below") if key in options}
    return Store(Shape(H, K, V, capacity, **options), IndexConfig(**index))


def filled(rows, **options):
    """A store with one stream of some rows: the store, their keys and values, the cursor."""
    made, keys, values = store(**options), items(rows), items(rows, seed=1, dim=V)
    number, cursor = made.append(made.new_stream(), 0, keys, values)
    assert (number, cursor) == (0, rows)
    return made, keys, values


def naive(keys, values, query, top_k):
    """The best rows of each query one by one: serial, keys, values."""
    serial = torch.full((H, query.shape[1], top_k), -1)
    for h in range(H):
        for n in range(query.shape[1]):
            order = sorted(range(keys.shape[1]), key=lambda r: -float(query[h, n] @ keys[h, r]))[:top_k]
            serial[h, n, : len(order)] = torch.tensor(order)
    return serial


@pytest.mark.parametrize("exact_below", [0, 10**9], ids=["faiss", "torch"])
@pytest.mark.parametrize("rows", [3, 40, LEAST + 70])
def test_search_is_the_naive_search(rows, exact_below):
    """FAISS's flat index over whole blocks with the newest rows compared beside it, or torch alone."""
    made, keys, values = filled(rows, exact_below=exact_below)
    query = items(6, seed=2)
    found = made.search(0, rows, query, 8)
    want = naive(keys, values, query, 8)
    assert torch.equal(found.serial, want)
    for h in range(H):
        there = want[h] >= 0
        assert torch.equal(found.keys[h][there], keys[h, want[h][there]])
        assert torch.equal(found.values[h][there], values[h, want[h][there]])


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq", "hnsw"])
def test_every_index_finds_a_key_that_was_stored(kind):
    made, keys, _ = filled(2 * LEAST + 5, kind=kind, exact_below=0)
    asked = [0, 300, 2 * LEAST - 1, 2 * LEAST + 4]
    found = made.search(0, 2 * LEAST + 5, keys[:, asked], 4)
    assert torch.equal(found.serial[..., 0], torch.tensor([asked] * H))


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["torch", "flat", "ivf", "ivfpq", "hnsw"])
def test_scores_are_the_products_of_queries_and_the_keys_that_came_back(kind, dtype, chunk):
    """By every way of searching, for rows the index covers and for newer ones; and best first."""
    options = {"exact_below": 10**9} if kind == "torch" else {"kind": kind, "exact_below": 0}
    made, *_ = filled(2 * LEAST + 6, dtype=dtype, chunk=chunk, **options)
    query = items(5, seed=2)
    found = made.search(0, 2 * LEAST + 6, query, 8)
    want = torch.einsum("hnk,hnjk->hnj", query.to(found.keys), found.keys)
    torch.testing.assert_close(found.score.to(want), want, atol=1e-6, rtol=1e-6)
    if chunk == 1:
        assert (found.score.diff(dim=-1) <= TIE).all()
    spared = made.search(0, 2 * LEAST + 6, query, 8, keys=False)
    assert spared.keys is None and all(torch.equal(a, b) for a, b in zip(found[:3], spared[:3], strict=True))


def test_an_empty_stream_returns_nothing_of_the_right_shape():
    made = store()
    found = made.search(made.new_stream(), 0, items(5), 3)
    assert (found.serial == -1).all()
    assert [t.shape for t in found] == [(H, 5, 3), (H, 5, 3), (H, 5, 3, V), (H, 5, 3, K)]
    assert found.score.isneginf().all()


def test_streams_never_return_each_others_rows():
    made = store()
    one, two = made.new_stream(), made.new_stream()
    made.append(one, 0, items(5), items(5, dim=V))
    made.append(two, 0, items(5, seed=3), items(5, seed=4, dim=V))
    assert torch.equal(
        made.search(two, 5, items(2), 5).values.sort(-2)[0][0, 0], items(5, 4, V)[0].sort(-2)[0]
    )


def test_a_reader_at_an_older_cursor_sees_what_was_there():
    made, keys, values = filled(6)
    before = made.search(0, 4, items(3, seed=2), 4)
    assert int(before.serial.max()) == 3
    made.append(0, 6, items(9, seed=5), items(9, seed=6, dim=V))
    for was, now in zip(before, made.search(0, 4, items(3, seed=2), 4), strict=True):
        assert torch.equal(was, now)


def test_writing_behind_an_older_cursor_goes_on_in_a_copy():
    made, keys, values = filled(6)
    number, cursor = made.append(0, 4, items(1, seed=5), items(1, seed=6, dim=V))
    assert (number, cursor) == (1, 5)
    assert torch.equal(made.search(0, 6, keys, 1).serial, torch.arange(6).expand(H, 6)[..., None])
    assert int(made.search(1, 5, keys, 5).serial.max()) == 4
    found = made.search(1, 5, items(1, seed=5), 1)
    assert (found.serial == 4).all() and torch.equal(found.values[:, :, 0], items(1, 6, V))


@pytest.mark.parametrize("exact_below", [0, 10**9], ids=["faiss", "torch"])
def test_the_oldest_make_room(exact_below):
    made, keys, values = filled(3 * LEAST, capacity=LEAST + 100, exact_below=exact_below)
    assert len(made) == LEAST + 100
    found = made.search(0, 3 * LEAST, items(20, seed=2), 50)
    assert int(found.serial.min()) >= 2 * LEAST - 100
    newest = keys[:, -LEAST:]
    assert torch.equal(
        made.search(0, 3 * LEAST, newest, 1).serial[..., 0], torch.arange(2 * LEAST, 3 * LEAST).expand(H, -1)
    )


def test_the_least_retrieved_make_room():
    made, keys, values = filled(4, capacity=4, eviction="least_retrieved")
    found = made.search(0, 4, keys[:, [0, 2]], 1)
    came_back = made.weights(0, 4, found.serial, torch.ones(H, 2, 1))
    assert came_back.tolist() == [H, 0, H, 0]
    made.append(0, 4, items(1, seed=5), items(1, seed=6, dim=V), came_back)
    assert sorted(set(made.search(0, 5, keys, 4).serial.flatten().tolist())) == [0, 2, 3, 4]


def test_states_older_than_what_is_kept_are_refused():
    made, keys, values = filled(4, capacity=4)
    for _ in range(4):
        cursor = made.streams[0].length
        made.append(0, cursor, items(3, seed=cursor), items(3, dim=V))
    with pytest.raises(
        StoreError, match=r"stream 0 at 4: readable from \d+ to 16; continue from a newer state"
    ):
        made.search(0, 4, keys, 1)
    with pytest.raises(StoreError, match="readable"):
        made.search(0, 17, keys, 1)
    with pytest.raises(StoreError, match=r"stream 7: the streams of this store are 0 … 0"):
        made.search(7, 0, keys, 1)


def test_a_forgotten_stream_holds_nothing_and_cannot_be_read_further_back():
    made, keys, values = filled(6)
    made.forget(0)
    assert len(made) == 0 and (made.search(0, 6, keys, 2).serial == -1).all()
    with pytest.raises(StoreError, match="readable from 6 to 6"):
        made.search(0, 5, keys, 2)


@pytest.mark.parametrize("exact_below", [0, 10**9], ids=["faiss", "torch"])
def test_chunks_are_found_by_their_mean_key_and_come_back_whole(exact_below):
    made, keys, values = filled(4 * LEAST + 6, chunk=4, exact_below=exact_below)
    chunks = keys[:, : 4 * LEAST + 4].unflatten(1, (-1, 4))
    query = items(5, seed=2)
    found = made.search(0, 4 * LEAST + 6, query, 8)
    best = torch.einsum("hnk,hrk->hnr", query, chunks.mean(2)).topk(2, -1).indices
    want = (best[..., None] * 4 + torch.arange(4)).flatten(-2)
    assert torch.equal(found.serial, want)


class PlainStore:
    """What a store means, in lists: a stream is a list of (serial, key, value, retrieved)."""

    def __init__(self, capacity, eviction):
        self.capacity, self.eviction = capacity, eviction

    def append(self, rows, length, new, retrieved):
        rows = [(s, k, v, w + retrieved.get(s, 0.0)) for s, k, v, w in rows]
        fresh = [(length + i, k, v, 0.0) for i, (k, v) in enumerate(new)]
        while self.capacity and len(rows) + len(fresh) > self.capacity:
            if not rows:
                fresh.pop(0)
            elif self.eviction == "oldest":
                rows.pop(0)
            else:
                rows.remove(min(rows, key=lambda row: (row[3], row[0])))
        return rows + fresh

    def best(self, rows, query, top_k):
        newest = max((row[0] for row in rows), default=0) + 1
        ranked = sorted(rows, key=lambda row: -float(query @ row[1]) - TIE * (row[0] + 1) / newest)
        return [row[0] for row in ranked[:top_k]]


STEP = st.tuples(st.integers(0, 2), st.integers(1, 4), st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(STEP, min_size=1, max_size=14),
    capacity=st.sampled_from([None, 4, 7]),
    eviction=st.sampled_from(["oldest", "least_retrieved"]),
    seed=st.integers(0, 99),
)
def test_the_store_does_what_plain_lists_do(steps, capacity, eviction, seed):
    """Three streams take turns; before each write some rows come back with weights."""
    made = Store(Shape(1, K, V, capacity, eviction))
    plain = PlainStore(capacity, eviction)
    rows, cursors = {s: [] for s in range(3)}, [(made.new_stream(), 0) for _ in range(3)]
    draw = torch.Generator().manual_seed(seed)
    for stream, m, search in steps:
        number, cursor = cursors[stream]
        retrieved, totals = None, {}
        if search:
            query = F.normalize(torch.randn(1, 2, K, generator=draw), dim=-1)
            found = made.search(number, cursor, query, 3)
            for n in range(2):
                want = plain.best(rows[stream], query[0, n], 3)
                assert found.serial[0, n].tolist() == want + [-1] * (3 - len(want))
            weight = torch.rand(1, 2, 3, generator=draw).double()
            retrieved = made.weights(number, cursor, found.serial, weight)
            for serial, w in zip(found.serial.flatten().tolist(), weight.flatten().tolist(), strict=True):
                totals[serial] = totals.get(serial, 0.0) + w
        keys = F.normalize(torch.randn(1, m, K, generator=draw), dim=-1)
        values = torch.randn(1, m, V, generator=draw)
        cursors[stream] = made.append(number, cursor, keys, values, retrieved)
        new = list(zip(keys[0], values[0], strict=True))
        rows[stream] = plain.append(rows[stream], cursor, new, totals)
        kept = made.streams[number]
        assert kept.serial.newest[kept.live].tolist() == [row[0] for row in rows[stream]]
    assert len(made) == sum(map(len, rows.values()))


def test_stale_keys_are_counted_by_the_encoder_that_made_them():
    made = store()
    assert stale_keys(made, items(3)) == []
    number, cursor = made.append(made.new_stream(), 0, items(2), items(2, dim=V))
    made.note_encoder(items(3))
    number, cursor = made.append(number, cursor, items(4), items(4, dim=V))
    made.note_encoder(items(3))  # the same again is not another encoder
    number, cursor = made.append(number, cursor, items(1), items(1, dim=V))
    made.note_encoder(-items(3))
    made.append(number, cursor, items(5), items(5, dim=V))
    unknown, first, second = stale_keys(made, -items(3))
    assert (unknown.rows, unknown.drift) == (2, None)
    assert first.rows == 5 and first.drift == pytest.approx(2.0)
    assert second.rows == 5 and second.drift == pytest.approx(0.0, abs=1e-6)


def test_an_encoder_that_stayed_has_not_drifted_whatever_its_keys():
    """A stream's first token is filed under the zeros before it; its key is zeros too and has no angle."""
    sketch = items(3)
    sketch[:, 0] = 0
    made = store()
    made.note_encoder(sketch)
    made.append(made.new_stream(), 0, items(2), items(2, dim=V))
    assert stale_keys(made, sketch)[0].drift == pytest.approx(0, abs=1e-6)
    assert stale_keys(made, items(3))[0].drift == pytest.approx(0, abs=1e-6), (
        "nor against a key that is there"
    )
    assert stale_keys(made, -items(3))[0].drift == pytest.approx(2)
