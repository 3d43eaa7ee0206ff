"""A short stream through every architecture, and mutants whose memory or speed does not stay flat."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memlib.config import Config, override
from memlib.evaluation.long_stream import Run, StreamResult, measure_stream, stream_table
from memlib.evaluation.retrieval import INDEXES
from memlib.memory import MEMORIES
from memlib.memory.external.columns import Column
from memlib.memory.external.store import Store
from memlib.memory.internal import InternalMemory, SlotState

DOCS = Path(__file__).parents[2] / "docs"
STORED, DIARY = DOCS / "results" / "stream.json", DOCS / "diary.md"
TOKENS = 6_000
SIZES = {
    "internal": {"num_slots": 8},
    "ltm": {"num_slots": 16, "slot_dim": 8},
    "hds": {"num_memories": 2, "num_slots": 8, "mem_dim": 8, "address_dim": 4, "num_blocks": 4},
    "ring": {"short_slots": 32, "long_slots": 32, "slot_dim": 8},
    "external": {"capacity": 256, "top_k": 4},
    "chapters": {"num_memory_tokens": 16, "num_chapters": 4, "tokens_per_chapter": 4, "top_k_chapters": 2},
    "facts": {"num_facts": 8, "keys_per_fact": 2, "start": "random"},
}


def small(*kinds: str) -> Config:
    """One layer of width 16; windows of 64."""
    changes = {"model.hidden_dim": 16, "model.num_heads": 2, "model.num_layers": 1, "model.vocab_size": 50}
    changes |= {"model.intermediate_dim": 16, "model.segment_length": 64, "memory.kinds": list(kinds)}
    changes |= {f"memory.{kind}.{name}": size for kind in kinds for name, size in SIZES[kind].items()}
    return override(Config(), changes | {"task.name": "passkey"})


def stays(result: StreamResult) -> list[str]:
    """What is wrong with a result but its speed, which no test asks for."""
    return replace(result, speed=result.fresh).unsteady()


def test_every_memory_is_measured():
    assert set(SIZES) == set(MEMORIES)


@pytest.mark.parametrize("kinds", [(), *((kind,) for kind in MEMORIES), tuple(MEMORIES)], ids="+".join)
def test_what_is_held_stays_flat_and_a_saved_copy_goes_on_the_same(kinds):
    result = measure_stream(small(*kinds), "small", TOKENS, segments=4)
    assert stays(result) == []
    assert set(result.held) == {result.held[0]} and (result.held[0] > 0) == bool(kinds)
    assert result.tokens == 6_144 and len(result.speed) == 10
    _, (row,) = stream_table([result])
    assert row[:3] == ["small", "6,144", "64"] and row[-1] == "equal logits"


@pytest.mark.parametrize(
    ("search", "changes"),
    [("ivf", {}), ("ivf", {"eviction": "least_retrieved"}), ("torch", {"chunk": 4})],
    ids=str,
)
def test_a_store_of_bounded_capacity_stays_flat(search, changes):
    config = override(small("external"), {f"memory.external.{name}": v for name, v in changes.items()})
    result = measure_stream(config, "small", TOKENS, 2, 4, search, INDEXES[search])
    assert stays(result) == []
    assert result.held[1] == max(result.held) and result.batch == 2


class Growing(InternalMemory):
    """Keeps one more slot with every segment."""

    def write(self, hidden, state, mask):
        slots = super().write(hidden, state, mask).slots
        return SlotState(torch.cat((slots, slots[:, :1]), 1))

    def check_state(self, state, name):
        """Nobody refuses it at the door."""


class Hoarding(InternalMemory):
    """Keeps every segment, out of its state's sight."""

    def write(self, hidden, state, mask):
        vars(self).setdefault("hoard", []).append(hidden.clone())
        return super().write(hidden, state, mask)


class Counting(InternalMemory):
    """Its reads hang on how often this module was asked, which no state tells."""

    def read(self, hidden, state):
        vars(self)["asked"] = vars(self).get("asked", 0) + 1
        return super().read(hidden, state) * (1 + 1e-3 * vars(self)["asked"])


@pytest.mark.parametrize(
    ("mutant", "said"),
    [
        (Growing, ["the state with its stores grew from", "the sum of all live tensors grew from"]),
        (Hoarding, ["the sum of all live tensors grew from"]),
        (Counting, ["the copy loaded half-way gave different logits"]),
    ],
)
def test_mutants_are_reported(monkeypatch, mutant, said):
    monkeypatch.setitem(MEMORIES, "internal", mutant)
    config = override(small("internal"), {"memory.internal.write": "attention"})
    complaints = stays(measure_stream(config, "small", 3000, segments=2))
    assert [any(part in c for c in complaints) for part in said] == [True] * len(said)
    assert len(complaints) == len(said)


def test_a_store_that_drops_nothing_is_reported(monkeypatch):
    monkeypatch.setattr(Store, "drop_gone", lambda self, stream: None)
    complaints = stays(measure_stream(small("external"), "small", TOKENS, 1, 4, "torch", INDEXES["torch"]))
    assert "the state with its stores grew from" in complaints[0]


def test_a_copy_that_lost_a_row_is_reported(monkeypatch):
    """The store as saved lacks its newest row's value."""
    reread = Run.reread

    def cut(self, index):
        copy = reread(self, index)
        (store,) = copy.stores.values()
        (stream,) = (s for s in store.streams.values() if s.length)
        values = Column(stream.values.buffer.shape[1:], torch.float32)
        values.append(stream.values.rows(0, len(stream.values)) + 1)
        stream.values = values
        return copy

    monkeypatch.setattr(Run, "reread", cut)
    result = measure_stream(small("external"), "small", TOKENS, 1, 4, "torch", INDEXES["torch"])
    assert not result.resumed


def test_speed_is_judged_against_a_model_without_a_past():
    """Half as fast is not flat, unless the machine itself was half as fast."""
    steady = [100.0] * 10
    slower = [100.0] * 9 + [50.0]
    result = StreamResult("m", "", 20, 1, 1, 1, 0.0, slower, steady, [1] * 10, [1] * 10, [1] * 10, True)
    (said,) = result.unsteady()
    assert said.startswith("the last tenth ran at 0.50 of the second tenth's speed") and said.endswith(
        "(at least 0.9)"
    )
    assert replace(result, fresh=slower).unsteady() == []
    leaking = replace(result, speed=steady, resident=[0, 0, *[2**25] * 8])
    assert leaking.unsteady() == ["the process grew by 33,554,432 bytes (at most 16,777,216)"]


def test_refusals():
    with pytest.raises(ValueError, match=r"tokens = 1,000: 4 calls of 4 segments of 64; use at least 4,865"):
        measure_stream(small(), "small", 1000, segments=4)
    with pytest.raises(ValueError, match="no external memory"):
        measure_stream(small("internal"), "small", TOKENS, 1, 4, "ivf", INDEXES["ivf"])


def test_the_stored_run_is_of_a_million_tokens_and_flat():
    results = [StreamResult(**found) for found in json.loads(STORED.read_text(encoding="utf-8"))]
    assert {r.name for r in results} >= {f"recall_{kind}" for kind in ("baseline", "internal", "hds", "ltm")}
    for result in results:
        assert result.tokens >= 1_000_000 and result.unsteady() == []
        _, (row,) = stream_table([result])
        assert f"| {row[0]} | {row[3]} | {' | '.join(row[4:])} |" in DIARY.read_text(encoding="utf-8")
