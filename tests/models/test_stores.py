"""Models whose external memories keep their pairs in stores: the same laws, the same answers, and disk."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import Tensor

from memlib.config import Config, IndexConfig, MemoryConfig, ModelConfig, override
from memlib.memory.external.backends import StoredState
from memlib.memory.external.store import StoreError
from memlib.models import MemoryState, MemoryTransformer
from memlib.models.stores import (
    attach_stores,
    detach_stores,
    encoder_sketches,
    external_memories,
    save_stores,
    stale_report,
)
from tests.laws import laws
from tests.laws.cases import BATCH, Case, stir

OPTIONS = {"num_heads": 2, "top_k": 3, "capacity": 12}


def case(**options) -> Case:
    sharing = options.pop("memory_sharing", "per_layer")
    kinds = {"external": OPTIONS | options}
    return Case("stored", {"memory_sharing": sharing}, kinds)


def contents(stores, place, state: StoredState) -> dict[str, Tensor]:
    """What a state's rows can read, without the numbers of their streams."""
    found = {}
    for row, (stream, cursor) in enumerate(zip(state.stream.tolist(), state.cursor.tolist(), strict=True)):
        rows = stores[place].at(stream, cursor)
        seen = rows.visible(cursor)
        seen = torch.ones(len(rows.serial), dtype=torch.bool) if seen is None else seen
        found[f"{row}.serial"] = rows.serial.newest[seen]
        found[f"{row}.keys"] = rows.keys.rows(0, len(seen))[seen]
        found[f"{row}.values"] = rows.values.rows(0, len(seen))[seen]
    return found


@pytest.fixture
def stored(monkeypatch):
    """A function from a case to what gives two models of the same weights and the same stores.

    The laws compare states; two states of a store are the same if the same can be read at them.
    """
    known = {}

    def make(case):
        one, two = case.build(), case.build()
        known.update(attach_stores(one))
        for place, memories in external_memories(two).items():
            for memory in memories:
                memory.attach(known[place])
        return cycle((one, two)).__next__

    plain = laws.same_state

    def same_state(law, what, got: MemoryState, want: MemoryState, within: float | None = None) -> None:
        plain(law, what, got.window, want.window, within)
        for place, (mine, theirs) in enumerate(zip(got.memories, want.memories, strict=True)):
            compare(law, f"{what}, bank {place}", place, mine, theirs, within)

    def compare(law, what, place, got, want, within):
        laws.same(law, f"{what}: last", got.last, want.last, within)
        laws.same(law, f"{what}: cursor", got.cursor, want.cursor)
        theirs = contents(known, place, want)
        for name, tensor in contents(known, place, got).items():
            laws.same(law, f"{what}: {name}", tensor, theirs[name], within)

    monkeypatch.setattr(laws, "same_state", same_state)
    return make


VARIANTS = {
    "fusion": {},
    "heads": {"join": "heads"},
    "joint": {"join": "joint"},
    "shared": {"memory_sharing": "shared", "capacity": 60},
    "chunks": {"chunk": 2, "top_k": 4},
    "roomy": {"capacity": 400},
}


@pytest.mark.parametrize("feeding", laws.FEEDINGS, ids=str)
@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_laws_hold_with_a_store(stored, options, law, feeding):
    laws.LAWS[law](stored(case(**options)), feeding)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("feeding", [laws.MANY, laws.PIECES, laws.FEEDINGS[3]], ids=str)
def test_a_store_answers_as_the_state_does(options, feeding):
    """Also beyond the capacity, padded and in pieces: only where the pairs are kept is different."""
    built = case(**options).build()
    tokens, mask = laws.stream(feeding), feeding.mask()
    tokens = torch.cat((tokens, tokens.flip(1)), 1)
    mask = None if mask is None else torch.cat((mask, mask.flip(1)), 1)
    want, _ = laws.feed(built, tokens, None, mask)
    attach_stores(built)
    laws.same("store", "logits", laws.feed(built, tokens, None, mask)[0], want)
    detach_stores(built)
    laws.same("store", "logits", laws.feed(built, tokens, None, mask)[0], want)


def test_eviction_by_retrieval_is_the_states_too():
    built = case(eviction="least_retrieved").build()
    tokens = laws.stream(laws.Feeding("long", (40,)))
    want, _ = laws.feed(built, tokens)
    oldest = case().build()
    assert (want - laws.feed(oldest, tokens)[0]).abs().max() > 1e-3
    attach_stores(built)
    laws.same("store", "logits", laws.feed(built, tokens)[0], want)


def test_a_stream_goes_on_from_disk(tmp_path):
    built, tokens = case().build(), laws.stream(laws.MANY)
    (first, rest), names = tokens.split((5, 7), 1), {}
    stores = attach_stores(built, tmp_path)
    want, _ = laws.feed(built, tokens)
    _, state = laws.feed(built, first)
    save_stores(stores, tmp_path)
    names = dict(state.named_tensors())

    again = case().build()
    reopened = attach_stores(again, tmp_path)
    assert all(len(reopened[place]) == len(store) for place, store in stores.items())
    state = again.init_state(BATCH).load(names)
    laws.same("disk", "logits", laws.feed(again, rest, state=state)[0], want[:, 5:])


def test_training_on_leaves_stale_keys_and_says_so():
    built = case().build()
    attach_stores(built)
    laws.feed(built, laws.stream(laws.MANY))
    rows = BATCH * 12
    for report in stale_report(built).values():
        assert [(r.encoder, r.rows, r.drift) for r in report] == [(0, rows, pytest.approx(0, abs=1e-6))]
    stir(built, 0.1)
    first, second, third = (report[0].drift for report in stale_report(built).values())
    assert min(first, second, third) > 1e-3


def test_looking_for_stale_keys_disturbs_nothing():
    built = case().build().train()
    stores = attach_stores(built)
    encoder_sketches(built)
    assert built.training and all(not len(store) and not store.next_stream for store in stores.values())


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no external memory: set memory.kinds: \[external\]"):
        attach_stores(MemoryTransformer(Config(model=ModelConfig(hidden_dim=8, num_heads=2, num_layers=1))))
    save_stores(attach_stores(case().build(), tmp_path), tmp_path)
    with pytest.raises(ValueError, match=r"the store is of .*capacity=12.*this memory of .*capacity=20"):
        attach_stores(case(capacity=20).build(), tmp_path)
    (tmp_path / "bank-0" / "store.json").write_text("{}")
    with pytest.raises(StoreError, match="damaged"):
        attach_stores(case().build(), tmp_path)


def test_a_state_of_before_a_store_was_attached_is_refused():
    built, tokens = case().build(), laws.stream(laws.MANY)
    _, state = laws.feed(built, tokens)
    attach_stores(built)
    with pytest.raises(
        ValueError, match="is a ExternalState: this memory now takes StoredState; start from None"
    ):
        laws.feed(built, tokens, state=state)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_retrieval_every_thins_the_layers_that_retrieve(every):
    config = override(
        Config(
            model=ModelConfig(hidden_dim=16, num_heads=2, num_layers=6, vocab_size=17, segment_length=4),
            memory=MemoryConfig(kinds=["internal", "external"]),
        ),
        {
            "memory.external.retrieval_every": every,
            "memory.internal.num_slots": 8,
            "memory.external.capacity": 12,
            "memory.external.top_k": 3,
        },
    )
    model = MemoryTransformer(config).double()
    have = [layer for layer in range(6) if "external" in model.block(layer).memories]
    assert have == list(range(every - 1, 6, every))
    assert all("internal" in model.block(layer).memories for layer in range(6))
    tokens = torch.randint(17, (2, 12))
    want, state = laws.feed(model, tokens)
    laws.same("pieces", "logits", laws.feed(model, tokens, (3, 4, 5))[0], want)
    assert len(state.memories) == 6 + len(have)
    stores = attach_stores(model, index=IndexConfig(kind="hnsw"))
    assert len(stores) == len(have) and all(store.index.kind == "hnsw" for store in stores.values())


def test_a_layer_count_that_leaves_none_is_refused():
    with pytest.raises(ValueError, match=r"memory.external.retrieval_every = 7: only 6 layers have memory"):
        override(
            Config(),
            {"model.num_layers": 6, "memory.kinds": ["external"], "memory.external.retrieval_every": 7},
        )
