"""What is read out of recordings: equal to what the memory really computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import rearrange

from memlib import load_config, override, record
from memlib.lab.ablation import Question, ablate, ask_without
from memlib.lab.measures import (
    best_hits,
    per_token,
    provenance,
    read_weight,
    retrieved,
    slot_life,
    write_strength,
)
from memlib.lab.trace import TraceError
from memlib.lab.widgets import hits_view, reading_over_text
from memlib.models import MemoryTransformer
from memlib.ops import gated_write


def stirred(preset="recall_internal", **changes) -> MemoryTransformer:
    memory = preset.removeprefix("recall_")
    small = {"model.num_layers": 2, f"memory.{memory}.num_slots": 16} | changes
    torch.manual_seed(0)
    model = MemoryTransformer(override(load_config(preset), small)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def model():
    return stirred()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trace(model, ids):
    with record(model) as trace, torch.no_grad():
        model(ids)
    return trace


@pytest.mark.parametrize("memory", ["internal", "ltm"])
def test_provenance_is_what_the_slots_hold(memory, ids):
    """Write one-hot vectors, an axis a token: slots then hold each token's share, and a read shows it."""
    model = stirred(f"recall_{memory}")
    with record(model) as trace, torch.no_grad():
        model(ids)
    row, length = 1, 16
    strength = torch.from_numpy(write_strength(trace, memory, row))
    kept = torch.from_numpy(per_token(trace, f"{memory}.writer.forget", row))
    erase = strength * rearrange(1 - kept, "n -> n 1")
    n = len(strength)
    slots, rows = torch.zeros(1, strength.shape[1], n), []
    for segment in torch.arange(n).split(length):
        rows.append(torch.from_numpy(read_weight(trace, memory, row))[segment] @ slots[0])
        slots = gated_write(slots, strength[None, segment], erase[None, segment], torch.eye(n)[None, segment])
    expected = torch.cat(rows).numpy()
    said = provenance(trace, memory, row)
    np.testing.assert_allclose(said, expected, atol=1e-5)
    assert said[:length].max() == 0 and said[length:].max() > 0.01  # only earlier segments are read
    wrong = provenance(trace, memory, row=0)
    assert np.abs(wrong - expected).max() > 1e-3


def test_retrieved_is_what_the_memory_gave_back(ids):
    """Each token's weights sum to one over tokens of earlier segments, and a planted pair is found."""
    torch.manual_seed(0)
    config = override(load_config("recall_external"), {"model.num_layers": 1})
    model = MemoryTransformer(config).eval()
    again = ids.clone()
    again[:, 48:50] = ids[:, 5:7]  # the pair of tokens 5 and 6 comes up again in the last segment
    with record(model) as trace, torch.no_grad():
        model(again)
    said = retrieved(trace)
    np.testing.assert_allclose(said[16:].sum(1), 1, atol=1e-4)
    assert not said[:16].any() and not np.triu(said).any()
    assert all(not said[t, t // 16 * 16 :].any() for t in range(64))
    assert said[48].argmax() == 6, "asked with token 5, it gives back what followed it"
    assert reading_over_text(trace, memory="external").arrays["source"][48, 0] == 6


def test_best_hits_are_the_memorys_own(ids):
    """Of all that came back the highest scores, their weights a softmax over all; nothing at the start."""
    torch.manual_seed(0)
    model = MemoryTransformer(override(load_config("recall_external"), {"memory.memory_layer_k": 2})).eval()
    with record(model) as trace, torch.no_grad():
        model(ids)
    hits = best_hits(trace, row=1, most=5)
    assert {name: part.shape for name, part in hits.items()} == dict.fromkeys(hits, (2, 4, 64, 5))
    source, score = (trace[f"external.{n}"].at(layer=1, batch=1).values[:, 60] for n in ("source", "score"))
    for head in range(4):
        order = np.argsort(-score[head], kind="stable")[:5]
        np.testing.assert_array_equal(hits["source"][1, head, 60], source[head, order])
        np.testing.assert_array_equal(hits["score"][1, head, 60], score[head, order])
        share = np.exp(score[head] - score[head].max())
        np.testing.assert_allclose(
            hits["weight"][1, head, 60], (share / share.sum())[order], rtol=1e-4, atol=1e-7
        )
    assert (hits["source"][:, :, :16] == -1).all() and not hits["weight"][:, :, :16].any()
    view = hits_view(trace, row=1, segment_length=16, marked=[60], most=5)
    assert (view.times, view.items, view.time) == (64, 20, 60)
    assert list(view.choices["layer"]) == ["layer 0", "layer 1"]
    layer, head = divmod(int(hits["weight"][:, :, 60, 0].argmax()), 4)
    u = hits["source"][layer, head, 60, 0]
    assert f"Token 60 “{ids[1, 60]}”: {u // 16}:{u % 16} “{ids[1, u]}” (layer {layer}" in view.summary


def test_hits_from_before_the_recording_are_refused(ids):
    model = MemoryTransformer(load_config("recall_external")).eval()
    with torch.no_grad():
        state = model(ids[:, :48]).memory_state
        with record(model) as trace:
            model(ids[:, 48:], memory_state=state)
    with pytest.raises(TraceError, match="record from the start"):
        hits_view(trace)


def test_a_token_that_was_not_searched_for_has_no_hits(ids):
    """The hybrid's gate, pinned shut for everything: no hit, and the view still stands."""
    gated = {"memory.external.retrieval_gate": "layer", "memory.external.retrieval_threshold": 1.0}
    model = MemoryTransformer(override(load_config("recall_external"), gated)).eval()
    with record(model) as trace, torch.no_grad():
        model(ids)
    view = hits_view(trace)
    assert (view.arrays["source"] == -1).all() and not view.arrays["search"].any()
    assert view.picture(40).alt == view.summary == "Hits of external memory for 64 tokens, in 4 heads."


def test_read_weights_sum_to_one(trace):
    np.testing.assert_allclose(read_weight(trace).sum(1), 1, atol=1e-5)


def test_slot_life(trace):
    life = slot_life(trace)
    assert {values.shape for values in life.values()} == {(4, 16)}
    np.testing.assert_allclose(life["written"].sum(), write_strength(trace).sum(), rtol=1e-5)
    after = trace["internal.after"].at(layer=0, batch=0).values
    before = trace["internal.before"].at(layer=0, batch=0).values
    np.testing.assert_allclose(before[1:], after[:-1], atol=1e-6)
    assert life["change"][0].max() > 0
    quiet = life["written"] <= 0.1
    assert (life["age"][~quiet] == 0).all() and (life["age"][quiet] >= 1).all()


def test_the_papers_write_has_measures_but_no_owners():
    model = stirred(**{"memory.internal.write": "attention"})
    with record(model) as trace, torch.no_grad():
        model(torch.randint(0, 64, (1, 48)))
    assert write_strength(trace).shape == (48, 16)
    assert slot_life(trace)["written"].shape == (3, 16)
    assert per_token(trace, "internal.writer.input").shape == (48,)
    with pytest.raises(TraceError, match="not written token by token"):
        provenance(trace)


def test_taking_nothing_away_changes_nothing(model, ids):
    with torch.no_grad():
        whole = torch.softmax(model(ids[:1]).logits[0, 50], -1)
    said = ask_without(model, ids[0], 50, [[]])
    np.testing.assert_allclose(said[0], whole, atol=1e-5)


def test_taking_everything_away_is_a_fresh_memory(model, ids):
    """In every memory layer of a one-layer bank: as if the stream began at the question's segment."""
    one = stirred(**{"model.num_layers": 1})
    said = ask_without(one, ids[0], 50, [range(16)])
    with torch.no_grad():
        alone = torch.softmax(one(ids[:1, 48:51]).logits[0, -1], -1)
    np.testing.assert_allclose(said[0], alone, atol=1e-5)
    assert np.abs(said - ask_without(one, ids[0], 50, [[]])).max() > 1e-4


def test_companions_go_together(model, ids, trace):
    writer = write_strength(trace).argmax(0)
    result = ablate(model, ids[0], [Question(50, 3), Question(60, 4)], writer, [0, 5, 7])
    assert result.alone.shape == result.together.shape == (3, 2, 64) and result.before.shape == (2, 64)
    np.testing.assert_allclose(result.alone.sum(-1), 1, atol=1e-5)
    group = [s for s in (0, 5, 7) if writer[s] == writer[5]]
    np.testing.assert_allclose(result.together[1, 0], ask_without(model, ids[0], 50, [group])[0], atol=1e-5)


def test_no_questions_is_said(model, ids):
    with pytest.raises(ValueError, match="no questions"):
        ablate(model, ids[0], [], np.zeros(16, int), [0])
