"""The long-context experiment: where its answers are, what each arm sees, and what it measures."""

import random
import re
from copy import deepcopy

import pytest
import torch

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

from torch.nn import functional as F

from memlib.config import override
from memlib.experiments.long_context import (
    ARMS,
    Material,
    Streams,
    answers_of,
    cache_bytes,
    configured,
    measure,
    read,
    residuals,
    shares,
    start_copying,
    train,
)
from memlib.pretrained.adapter import MemoryAdapter

from ..laws import cases
from .bases import tiny

LENGTH, VOCAB = 48, 512
FACTS = {1: 2, 2: 1, 4: 2}
SMALL = {
    "model.segment_length": LENGTH,
    "memory.memory_layer_custom": [1],
    "memory.external.capacity": 5 * LENGTH,
    "memory.external.top_k": 5 * LENGTH,
    "memory.external.sharpness": 4.0,
    "memory.internal.num_slots": 8,
    "adapter.width": 8,
    "adapter.base_model_name": "tiny",
}


class Words:
    """A tokenizer of whole words with the space before them."""

    def __init__(self):
        self.ids, self.words = {}, []

    def __call__(self, text, add_special_tokens=False):
        found = re.findall(r" ?[^\s.]+|\.", text)
        for word in found:
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return {"input_ids": [self.ids[word] for word in found]}

    def decode(self, ids):
        return "".join(self.words[id_] for id_ in ids)


@pytest.fixture(scope="module")
def material():
    draw = random.Random(0)
    return Material(Words(), " ".join(f"p{draw.randrange(60)}" for _ in range(2000)))


def stream(material, seed=0, test=True, facts=FACTS, asks=2):
    return material.stream(random.Random(seed), facts, asks, LENGTH, test)


def adapter(arm="external", **options):
    """A tiny adapter of an arm, its branches moved off their start."""
    config = override(configured(arm), SMALL | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MemoryAdapter(config, tiny(dtype=torch.float32, vocab=VOCAB)).eval()
    cases.stir(model.branches)
    return model


def places_of(part, ids):
    """Where a list of ids occurs in another."""
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]


@pytest.mark.parametrize("seed", range(5))
def test_each_answer_stands_at_its_distance_and_nowhere_else(material, seed):
    one = stream(material, seed)
    assert len(one.windows) == max(FACTS) and all(len(w.ids) == LENGTH for w in one.windows + one.asks)
    asked = []
    for ask in one.asks:
        for question in ask.questions:
            sentence = ask.ids[question.place - 8 : question.place + 1].tolist()
            said = material.tokenizer.decode(sentence[:-1])
            assert re.fullmatch(r" The access code of the \w+ \w+ is", said)
            assert sentence[-1] == question.answer
            for i, window in enumerate(one.windows):
                here = len(one.windows) - i == question.distance
                assert len(places_of(sentence, window.ids.tolist())) == here
            asked.append(question.distance)
        assert ask.ordinary.sum() == LENGTH - 10 * len(ask.questions)
    assert sorted(asked) == sorted(d for d, count in FACTS.items() for _ in range(count))


def test_training_and_test_share_no_noun_and_no_prose(material):
    nouns = material.nouns
    assert nouns[True] and not set(nouns[True]) & set(nouns[False])
    assert not set(material.answers[True]) & set(material.answers[False])
    ids = {test: {material.encode(f" {noun}")[0] for noun in nouns[test]} for test in nouns}
    for test in (True, False):
        one = stream(material, 3, test)
        said = {id_ for window in one.windows + one.asks for id_ in window.ids.tolist()}
        assert said & ids[test] and not said & ids[not test]
        found = [q.seen for ask in one.asks for q in ask.questions]
        assert all(found) if not test else 0 < sum(found) < len(found)


def test_sentences_that_do_not_fit_are_refused(material):
    with pytest.raises(ValueError, match=f"take 50 tokens of a window of {LENGTH}"):
        stream(material, facts={1: 5}, asks=1)


@torch.no_grad()
def test_each_arm_sees_what_it_should(material):
    one = stream(material)
    ask, base = one.asks[0].ids, tiny(dtype=torch.float32, vocab=VOCAB)
    whole = torch.cat([*(window.ids for window in one.windows), ask])
    alone, together = base(ask[None]).logits[0], base(whole[None]).logits[0, -LENGTH:]
    assert (alone - together).abs().max() > 1e-2

    def last(model, windows):
        state = None
        for window in windows:
            state = read(model, window.ids, state)[1]
        return read(model, ask, state)[0]

    torch.testing.assert_close(last(base, one.windows), together)
    torch.testing.assert_close(last(adapter("window"), one.windows), alone)
    other = [stream(material, 1).windows[0], *one.windows[1:]]  # the oldest window differs
    for arm in ("external", "internal"):
        model = adapter(arm)
        assert not torch.equal(last(model, one.windows), last(model, other))
        model.close_memory()
        torch.testing.assert_close(last(model, one.windows), alone)


@pytest.mark.parametrize("arm", ["base", "external", "internal"])
@torch.no_grad()
def test_measuring_equals_a_naive_loop(material, arm):
    model = tiny(dtype=torch.float32, vocab=VOCAB) if arm == "base" else adapter(arm)
    streams = [stream(material, seed) for seed in (0, 1)]
    losses, right, ordinary = {}, {}, []
    for one in streams:
        for i, ask in enumerate(one.asks):
            ids = torch.cat([*(window.ids for window in one.windows), ask.ids])
            logits = model(ids[None]).logits[0]
            first = len(one.windows) * LENGTH
            for question in ask.questions:
                place = first + question.place
                lost = -torch.log_softmax(logits[place - 1], -1)[ids[place]].item()
                losses.setdefault(question.distance, []).append(lost)
                right.setdefault(question.distance, []).append(bool(logits[place - 1].argmax() == ids[place]))
            for w, window in enumerate([*one.windows, ask]):
                if w < len(one.windows) and i:
                    continue
                for t in range(1, LENGTH):
                    if window.ordinary[t]:
                        at = w * LENGTH + t
                        ordinary.append(F.cross_entropy(logits[at - 1], ids[at]).item())
    result = measure(model, streams)
    for distance, row in result["by_distance"].items():
        assert row["loss"] == pytest.approx(sum(losses[distance]) / len(losses[distance]), abs=1e-3)
        assert row["accuracy"] == pytest.approx(sum(right[distance]) / len(right[distance]), abs=1e-4)
        assert row["questions"] == len(losses[distance]) == 2 * FACTS[distance]
    assert result["ordinary"] == pytest.approx(sum(ordinary) / len(ordinary), abs=1e-3)
    assert result["by_seen"]["seen"]["questions"] + result["by_seen"]["new"]["questions"] == 10


@torch.no_grad()
def test_shares_of_an_external_memory_are_the_weights_of_its_read(material):
    model, one = adapter(), stream(material)
    weights, sources = [], []
    memory = model.branch(1).memories.memory_list[0]
    past = torch.cat([window.ids for window in one.windows])
    with Streams(model) as seen:
        state = model(past[None]).memory_state
        memory.weight_point.listeners.append(weights.append)
        memory.source_point.listeners.append(sources.append)
        model(one.asks[0].ids[None], memory_state=state)
        share = seen.shares(len(one.windows), one.asks[0])
    before = answers_of(one.asks[0])[0] - 1
    assert share.shape == (len(before), len(past))
    weight, source = weights[0][0, 0, before], sources[0][0, 0, before]
    exist = source >= 0
    read_ = torch.zeros_like(share).scatter_add(1, source.clamp(min=0), weight * exist)
    torch.testing.assert_close(read_, share)


def test_shares_of_an_internal_memory_are_what_each_token_adds_to_the_read(material):
    model = adapter("internal", **{"memory.internal.forget_bias": 50.0})  # nothing is erased
    memory = model.branch(1).memories.memory_list[0]
    memory.writer.forget_gate.weight.data.zero_()
    stored = [torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    asking = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    values = [torch.zeros(1, 5, 8, requires_grad=True) for _ in stored]
    given = iter(values)
    memory.writer.v_proj.register_forward_hook(lambda *_: next(given))
    memory.reader.o_proj.register_forward_hook(lambda _m, args, _o: args[0])
    memory.reader.output_gate = torch.nn.Identity()
    state, mask = memory.init_state(1), torch.ones(1, 5, dtype=torch.bool)
    for hidden in stored:
        state = memory.write(hidden, state, mask)
    reads = memory.read(asking[None], state)[0]  # linear in tanh(value), with slope 1 at zero
    slopes = [torch.autograd.grad(one[0], values, retain_graph=True) for one in reads]
    added = torch.stack([torch.cat(slope, 1)[0, :, 0] for slope in slopes])
    found = shares(memory, stored, asking)
    torch.testing.assert_close(found, added / added.sum(-1, keepdim=True))
    torch.testing.assert_close(found.sum(-1), torch.ones(3))


@torch.no_grad()
def test_residuals_are_those_after_the_layer(material):
    base, one = tiny(dtype=torch.float32, vocab=VOCAB), stream(material)
    windows = [window.ids for window in one.windows]
    collected = residuals(base, 1, windows)
    assert collected.shape == (len(windows) * LENGTH, 16)
    hidden = base(windows[1][None], output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(collected[LENGTH : 2 * LENGTH], hidden)


@pytest.mark.parametrize("arm", ["external", "internal"])
@torch.no_grad()
def test_the_start_makes_a_read_token_more_probable(arm):
    """On a stream that holds the tokens' embeddings, rotated: what is added is nearest to the token's own."""
    branch = adapter(arm, **{"adapter.width": 16}).branch(1)
    draw = torch.Generator().manual_seed(0)
    embedding = torch.randn(64, 16, generator=draw)
    ids = torch.randint(64, (2000,), generator=draw)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=draw)).Q
    found = 5 * embedding[ids] @ turn + torch.randn(2000, 16, generator=draw)
    found[::100] *= 1000  # attention sinks

    def predicted():
        read_ = branch.norm(branch.down_proj(found))
        memory = branch.memories.memory_list[0]
        if arm == "internal":
            read_ = memory.reader.o_proj(torch.tanh(memory.writer.v_proj(read_)))
        else:
            read_ = memory.o_proj(memory.v_proj(read_))
        added = branch.up_proj[0](read_)
        scores = F.normalize(added, dim=-1) @ F.normalize(embedding, dim=-1).T
        return (scores.argmax(-1) == ids).float().mean()

    assert predicted() < 0.1
    branch.norm.reset_parameters()
    start_copying(branch, embedding, found, ids, 1.5)
    assert predicted() > 0.9
    added = branch.up_proj[0](branch.norm(branch.down_proj(found)))
    assert added.pow(2).mean(-1).sqrt().median() == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize("arm", ["external", "internal", "external_plain"])
def test_training_learns_and_leaves_the_base_as_it_was(material, arm):
    model = adapter(arm)
    before = deepcopy(model.base.state_dict())
    one = stream(material, test=False, facts={1: 2, 2: 2}, asks=1)
    history = train(model, [one] * 40, 3e-2, ARMS[arm].helped, log=lambda _line: None)
    names = {"answer", "ordinary", "right"} | ({"retrieval"} if ARMS[arm].helped else set())
    assert set(history[0]) == names
    assert sum(history[-1].values()) < sum(history[0].values())
    assert history[-1]["answer"] < history[0]["answer"]
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())
    with torch.no_grad():
        assert measure(model, [one])["all"]["questions"] == 4


def test_cache_bytes_are_those_of_the_cache():
    base = tiny(dtype=torch.float32, vocab=VOCAB)
    cache = base(torch.arange(7)[None], use_cache=True).past_key_values
    kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(base, 7) == kept
