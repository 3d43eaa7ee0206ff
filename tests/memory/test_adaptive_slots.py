"""Adaptive slots against their rule in plain Python: taking, use, reclaiming, pruning."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from memlib.config import LtmMemoryConfig
from memlib.memory import LongTermMemory
from memlib.memory.adaptive_slots import SlotRule

B, N, D, S, E = 2, 5, 6, 4, 8
K = E // 2


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(**options):
    torch.manual_seed(0)
    sizes = {"num_slots": S, "slot_dim": E, "slots": "adaptive", "reclaim_after": 3}
    built = LongTermMemory(LtmMemoryConfig(**(sizes | options)), D).double().eval()
    with torch.no_grad():
        built.writer.importance_gate.weight.copy_(random(1, E, seed=9))
    return built


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm())) if a.norm() and b.norm() else 0.0


class PlainRow:
    """One row's bank, as the rule in slots.py says it."""

    def __init__(self, config):
        self.config = config
        self.bank = [torch.zeros(E, dtype=torch.float64) for _ in range(S)]
        self.age = [config.reclaim_after] * S

    def free(self, s):
        return self.age[s] >= self.config.reclaim_after

    @torch.no_grad()
    def segment(self, queries, tokens, strengths):
        c, used = self.config, set()
        for s in range(S):
            alike = max(cosine(q, self.bank[s][:K]) for q in queries)
            if not self.free(s) and alike >= c.match_threshold:
                used.add(s)
        for new, g in zip(tokens, strengths, strict=True):
            matches = {s: cosine(new[:K], self.bank[s][:K]) for s in range(S) if not self.free(s)}
            best = max(matches, key=matches.get, default=None)
            if best is None or matches[best] < c.match_threshold:
                best = max(range(S), key=lambda s: (-1 if s in used else self.age[s], -s))
                self.bank[best] = torch.cat((new[:K], torch.zeros(K, dtype=torch.float64)))
            self.bank[best] = (1 - g) * self.bank[best] + g * new
            used.add(best)
            self.age[best] = 0
        for s in range(S):
            self.age[s] = 0 if s in used else min(self.age[s] + 1, c.reclaim_after)
            if self.bank[s][K:].norm() < c.prune_below:
                self.age[s] = c.reclaim_after
            if self.free(s):
                self.bank[s] = torch.zeros(E, dtype=torch.float64)


def check(rule=SlotRule, seed=0, segments=12, words=4, ratio=0.6, faint=-8.0, **options):
    """Feed segments of a few words, so that keys come again, and compare after each."""
    built = memory(memory_compression_ratio=ratio, shift_init=0.0, **options)
    built.rule = rule(built.rule.match_threshold, built.rule.reclaim_after, built.rule.prune_below)
    config = LtmMemoryConfig(num_slots=S, slot_dim=E, **({"reclaim_after": 3} | options))
    rows, state = [PlainRow(config) for _ in range(B)], built.init_state(B)
    vocabulary = random(words, D, seed=seed + 100)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(segments):
        said = torch.randint(words, (B, N), generator=generator)
        mask = torch.rand(B, N, generator=generator) < 0.8
        mask[:, 0] = True
        hidden = vocabulary[said]
        with torch.no_grad():
            built.writer.importance_gate.bias.fill_(
                faint if torch.rand((), generator=generator) < 0.3 else 1.0
            )
            tokens = built.writer.compress(hidden, mask, state.segments)
            state = built.write(hidden, state, mask)
        for b, row in enumerate(rows):
            kept = tokens.kept[b]
            queries = built.key.query(hidden).detach()[b, mask[b]]
            row.segment(queries, tokens.new[b, kept], tokens.strength[b, kept])
            assert state.age[b].tolist() == row.age
            torch.testing.assert_close(state.slots[b], torch.stack(row.bank), atol=1e-5, rtol=0)


@given(
    seed=st.integers(0, 2**20),
    words=st.integers(1, 12),
    match_threshold=st.sampled_from([0.3, 0.7, 0.95]),
    reclaim_after=st.integers(1, 5),
    ratio=st.sampled_from([0.2, 0.6, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_adaptive_slots_follow_their_rule(seed, words, match_threshold, reclaim_after, ratio):
    check(seed=seed, words=words, match_threshold=match_threshold, reclaim_after=reclaim_after, ratio=ratio)


class NeverMatches(SlotRule):
    def choose(self, new, strength, kept, keys, age):
        never = SlotRule(2.0, self.reclaim_after, self.prune_below)
        return never.choose(new, strength, kept, keys, age)


class ForgetsWhoAsked(SlotRule):
    def asked(self, query, mask, keys, age):
        return torch.zeros_like(age, dtype=torch.bool)


class NeverPrunes(SlotRule):
    def reclaim(self, slots, values, age):
        return super().reclaim(slots, torch.ones_like(values), age)


class NeverReclaims(SlotRule):
    def reclaim(self, slots, values, age):
        return slots, torch.where(age < 0, 0, age)


class TakesTheYoungest(SlotRule):
    def choose(self, new, strength, kept, keys, age):
        where, fresh, _ = super().choose(new, strength, kept, keys, -age)
        return where, fresh, age


class DroppedTokensTake(SlotRule):
    def choose(self, new, strength, kept, keys, age):
        return super().choose(new, strength, torch.ones_like(kept), keys, age)


@pytest.mark.parametrize(
    "fault", [NeverMatches, ForgetsWhoAsked, NeverPrunes, NeverReclaims, TakesTheYoungest]
)
def test_another_rule_is_caught(fault):
    options = {"words": 8, "segments": 30}
    check(**options)
    with pytest.raises(AssertionError):
        check(fault, **options)


def test_dropped_tokens_that_take_slots_in_training_are_caught():
    """In evaluation the dropped are not even there; in training they are carried along."""
    hidden, mask = random(B, N, D), torch.ones(B, N, dtype=torch.bool)
    for rule, sound in ((SlotRule, True), (DroppedTokensTake, False)):
        built = memory(exploration=0.0, memory_compression_ratio=0.4)
        built.rule = rule(0.99, 3, 0.0)
        want = built.write(hidden, built.init_state(B), mask)
        got = built.train().write(hidden, built.init_state(B), mask)
        assert torch.equal(got.age, want.age) == sound


@torch.no_grad()
def test_a_bank_grows_with_what_there_is_to_tell_apart():
    built = memory(memory_compression_ratio=1.0, shift_init=0.0, num_slots=16, importance_bias=3.0)
    mask, vocabulary = torch.ones(1, N, dtype=torch.bool), random(3, D, seed=5)
    state, in_use = built.init_state(1), []
    for said in ([0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 2, 0, 2, 1], [2, 2, 1, 1, 0]):
        state = built.write(vocabulary[None, said], state, mask)
        in_use.append(int((state.age < 3).sum()))
    assert in_use == [1, 2, 3, 3]


@torch.no_grad()
def test_a_slot_is_free_after_so_many_segments_without_use_and_kept_by_asking():
    built = memory(memory_compression_ratio=0.01, shift_init=0.0, importance_bias=3.0)
    one = torch.ones(1, 1, dtype=torch.bool)
    words = F.normalize(random(3, D, seed=5), dim=-1)
    first, other = words[None, :1], words[None, 1:2]
    for asked in (False, True):
        state = built.write(first, built.init_state(1), one)
        lives = []
        for _ in range(4):
            segment = torch.cat((other, first), 1) if asked else other
            state = built.write(segment, state, torch.ones(1, segment.shape[1], dtype=torch.bool))
            key = built.key.query(first)[0, 0]
            lives.append(any(cosine(slot[:K], key) > 0.99 for slot in state.slots[0]))
        assert lives == ([True] * 4 if asked else [True, True, False, False])


@torch.no_grad()
def test_free_slots_are_empty_and_not_read():
    built = memory()
    hidden = random(B, N, D)
    assert not built.read(hidden, built.init_state(B)).any()
    state = built.write(hidden, built.init_state(B), torch.ones(B, N, dtype=torch.bool))
    free = state.age >= 3
    assert free.any() and not state.slots[free].any()
    read = built.read(hidden, state)
    noise = torch.where(free[..., None], random(B, S, E, seed=8), state.slots)
    torch.testing.assert_close(built.read(hidden, replace(state, slots=noise)), read)


def test_gradients_pass_a_written_slot():
    """Where tokens go is fixed by small steps; what they write has its gradient."""
    built, mask = memory(memory_compression_ratio=1.0), torch.ones(1, N, dtype=torch.bool)

    def said(hidden):
        state = built.write(hidden, built.init_state(1), mask)
        return built.read(random(1, 2, D, seed=1), state)

    assert torch.autograd.gradcheck(said, [random(1, N, D).requires_grad_()])
