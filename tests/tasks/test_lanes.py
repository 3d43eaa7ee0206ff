"""Documents in lanes and in buckets: each is read once, by itself, and little is padding."""

import numpy as np
import pytest
import torch

from memlib.config import TaskConfig, TextConfig
from memlib.tasks import Batch, TextDocuments, make_task
from memlib.tasks.lanes import assign, buckets

N, SEGMENTS, ROWS = 8, 4, 3


def skewed(count=200, seed=0):
    return np.ceil(np.random.default_rng(seed).lognormal(1.5, 1.2, count)).astype(int)


def rng(epoch=0):
    return np.random.default_rng([3, epoch])


def test_lanes_share_the_documents_evenly():
    lengths = skewed()
    for lanes in (1, 4, 16):
        found = assign(lengths, lanes, rng())
        assert sorted(np.concatenate(found)) == list(range(len(lengths)))
        loads = [lengths[documents].sum() for documents in found]
        shortest = max(lengths.sum() / lanes, lengths.max())
        assert max(loads) <= 4 / 3 * shortest and max(loads) - min(loads) <= lengths.max()
        in_turn = [lengths[lane::lanes].sum() for lane in range(lanes)]
        assert lanes == 1 or max(loads) < 0.9 * max(in_turn)


def test_the_longest_lane_is_as_long_in_every_epoch_and_its_order_is_not():
    lengths = skewed()
    first, again, second = (assign(lengths, 4, rng(epoch)) for epoch in (0, 0, 1))
    assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, second))
    loads = [max(lengths[lane].sum() for lane in found) for found in (first, second)]
    assert loads[0] == loads[1]
    assert any(np.any(np.diff(lengths[lane]) > 0) for lane in first)  # not the longest first


def test_buckets_keep_to_their_budget():
    lengths = np.minimum(skewed(), SEGMENTS)
    batches = buckets(lengths, ROWS, SEGMENTS, rng())
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * lengths[batch].max() <= ROWS * SEGMENTS
    uneven = [batch for batch in batches if len(batch) % ROWS]
    assert len(uneven) <= 1 and all((lengths[batch] == lengths.min()).all() for batch in uneven)
    longest = [lengths[batch].max() for batch in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert len(buckets(lengths, ROWS, SEGMENTS, rng(1))) == len(batches)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents")
    for i, length in enumerate(skewed(40, 1) * 3):
        (path / f"{i:02}.txt").write_text((f"<{i}> " + "abcdefghij" * 60)[: max(8, length)])
    return path


def task_of(folder, how, segments=SEGMENTS):
    return TextDocuments(TextConfig(dataset=str(folder), documents=how), N, segments)


def originals(folder):
    return sorted(file.read_bytes() for file in folder.iterdir())


def pieces_of(row_ids, row_targets, row_mask, begins):
    """(ids, targets) of the pieces of a row that begin at these tokens, without padding."""
    for first, last in zip(begins, [*begins[1:], len(row_ids)], strict=True):
        real = row_mask[first:last]
        assert not bool((real[1:] & ~real[:-1]).any())  # padding only behind
        yield bytes(row_ids[first:last][real].tolist()), bytes(row_targets[first:last][real].tolist())


@pytest.mark.parametrize("epoch", [0, 2])
def test_lanes_read_each_document_once_and_whole(folder, epoch):
    task = task_of(folder, "lanes")
    read = []
    for split in ("train", "test"):
        count = task.batches_per_epoch(ROWS, split)
        batches = [task.batch(ROWS, epoch * count + i, seed=5, split=split) for i in range(count)]
        assert batches[0].starts.all() and all(
            batch.tokens.shape == (ROWS, SEGMENTS * N) for batch in batches
        )
        ids, targets, mask, scored, fresh = (
            torch.cat([getattr(batch, name) for batch in batches], 1)
            for name in ("tokens", "targets", "mask", "scored", "fresh")
        )
        assert torch.equal(mask, scored)
        for row in range(ROWS):
            begins = (N * fresh[row].nonzero().flatten()).tolist()
            for inputs, outputs in pieces_of(ids[row], targets[row], mask[row], begins):
                assert inputs[:1] == outputs[-1:] == b"\0" and inputs[1:] == outputs[:-1]
                read.append(inputs[1:])
    assert sorted(read) == originals(folder)


def test_buckets_read_each_document_once_in_pieces(folder):
    task, read, rows = task_of(folder, "buckets"), [], set()
    assert not task.continues
    for split in ("train", "test"):
        for step in range(task.batches_per_epoch(ROWS, split)):
            batch = task.batch(ROWS, step, split=split)
            assert batch.starts.all() and batch.fresh is None and not len(batch.tokens) % ROWS
            assert batch.tokens.numel() <= ROWS * SEGMENTS * N
            rows.add(len(batch.tokens))
            for row in zip(batch.tokens, batch.targets, batch.mask, strict=True):
                read += [outputs for _, outputs in pieces_of(*row, [0]) if outputs]
    assert len(rows) > 1 and max(map(len, read)) == SEGMENTS * N
    whole = [piece for piece in read if piece.endswith(b"\0")]
    assert len(whole) == len(originals(folder))
    assert sum(map(len, read)) == sum(len(text) + 1 for text in originals(folder))


def test_a_batch_is_a_function_of_seed_split_and_step(folder):
    for how in ("lanes", "buckets"):
        task, other = task_of(folder, how), task_of(folder, how)
        count = task.batches_per_epoch(ROWS)
        batch = task.batch(ROWS, 1, seed=1)
        other.batch(ROWS, 5 * count, seed=9)
        assert torch.equal(batch.tokens, other.batch(ROWS, 1, seed=1).tokens)
        for changed in ({"seed": 2}, {"step": 1 + count}, {"split": "test"}):
            again = task.batch(ROWS, **({"step": 1, "seed": 1} | changed)).tokens
            assert again.shape != batch.tokens.shape or not torch.equal(batch.tokens, again)


def test_rows_and_parts_take_their_borders_along(folder):
    batch = task_of(folder, "lanes").batch(ROWS, 0)
    part = slice(N, 3 * N)
    more = batch.rows(slice(1, 2)).borders(part, N)
    assert torch.equal(more["fresh"], batch.fresh[1:2, 1:3])
    assert torch.equal(more["attention_mask"], batch.mask[1:2, part])
    plain = Batch(batch.tokens, batch.targets, batch.scored, batch.starts)
    assert plain.rows(slice(1, 2)).borders(part, N) == {} and plain.to("cpu").mask is None


def test_too_few_documents_are_refused(folder, tmp_path):
    task = make_task(TaskConfig(name="text", text=TextConfig(dataset=str(folder), documents="lanes")), N)
    with pytest.raises(ValueError, match="train documents are too few for 100 rows"):
        task.batch(100, 0)
    assert task.test_rows(64) == len(task.documents["test"][0]) < 64
    (tmp_path / "one.txt").write_text("one document " * 100)
    with pytest.raises(ValueError, match=r"documents = 'lanes': .* holds one document"):
        task_of(tmp_path, "lanes")
