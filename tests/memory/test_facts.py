"""Facts that are written by a call, read where a text names their subjects."""

from __future__ import annotations

import pytest
import torch
from einops import einsum

from memlib.config import FactsMemoryConfig
from memlib.memory import FactMemory
from memlib.memory.facts import FactState

D, P = 24, 3


def memory(**options) -> FactMemory:
    sizes = {"num_facts": 6, "keys_per_fact": P, "window": 2, "sharpness": 40.0, "threshold": 0.6}
    return FactMemory(FactsMemoryConfig(**sizes | options), D)


def subjects(count: int, noise: float = 0.1, seed: int = 0, sentences: int = 0) -> torch.Tensor:
    """Subjects in P sentences: [f p d], a direction each, moved by each sentence along two common axes.

    sentences: the seed of the sentences.
    """
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(sentences)
    own, common = torch.randn(count, 1, D, generator=generator), torch.randn(2, D, generator=generator)
    return own + noise * torch.randn(count, P, 2, generator=other) @ common


def read(facts: FactMemory, mean: torch.Tensor) -> torch.Tensor:
    return facts.weights(mean) @ facts.values


def test_a_new_memory_says_nothing_and_a_written_fact_has_value_zero():
    facts, shown = memory(), subjects(4)
    hidden = torch.randn(2, 5, D)
    assert not facts.read(hidden, facts.init_state(2)).any()
    places = facts.write_facts(shown)
    assert places.tolist() == [0, 1, 2, 3]
    assert not read(facts, shown).any()


def test_a_subject_reads_its_own_value_and_other_text_the_null_slot():
    facts, shown = memory(), subjects(4)
    facts.write_facts(shown)
    with torch.no_grad():
        facts.values.copy_(torch.eye(6, D))
    unseen = subjects(4, seed=0) + 0.02 * torch.randn(4, P, D)
    weight = facts.weights(unseen)
    assert weight.argmax(-1).eq(torch.arange(4)[:, None]).all()
    assert weight.amax(-1).min() > 0.9
    other = facts.weights(subjects(30, seed=9))
    assert other.sum(-1).median() < 0.01


def test_whitening_tells_subjects_apart_that_sentences_blur():
    """Sentences differ along two common axes by more than subjects do: only whitened keys find those."""
    facts, plain = memory(), memory(shrinkage=1e6)
    shown, asked = subjects(6, noise=6.0), subjects(6, noise=6.0, sentences=1)

    def right(one: FactMemory) -> float:
        one.write_facts(shown)
        cosine = einsum(one.key(asked), one.keys, "f p d, g q d -> f p g q").amax(-1)
        return float((cosine.argmax(-1) == torch.arange(6)[:, None]).float().mean())

    assert right(facts) == 1.0
    assert right(plain) < 0.9


def test_forgetting_frees_the_places_and_leaves_the_others_bit_for_bit():
    facts, shown = memory(), subjects(5)
    facts.write_facts(shown)
    with torch.no_grad():
        facts.values.normal_()
    before, kept = read(facts, shown), torch.tensor([0, 2, 4])
    facts.forget_facts(torch.tensor([1, 3]))
    assert torch.equal(read(facts, shown)[kept], before[kept])
    assert read(facts, shown)[[1, 3]].abs().max() < 1e-3 * before.abs().max()
    assert not facts.values[[1, 3]].any()
    assert facts.write_facts(subjects(2, seed=5)).tolist() == [1, 3]


def test_too_many_facts_and_wrong_keys_are_refused_and_change_nothing():
    facts = memory()
    facts.write_facts(subjects(4))
    before = {name: tensor.clone() for name, tensor in facts.state_dict().items()}
    with pytest.raises(ValueError, match=r"3 facts for 2 free places: .* memory.facts.num_facts = 6"):
        facts.write_facts(subjects(3, seed=1))
    with pytest.raises(ValueError, match=r"keys of shape \[2, 24\]: expected \[3, 24\]"):
        facts.write_facts(subjects(1)[:, :2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in facts.state_dict().items())


def test_a_key_is_the_mean_of_the_last_tokens_also_over_a_border():
    facts = memory(window=3)
    hidden, mask = torch.randn(1, 8, D), torch.ones(1, 5, dtype=torch.bool)
    state = facts.write(hidden[:, :5], facts.init_state(1), mask)
    assert isinstance(state, FactState) and torch.equal(state.recent, hidden[:, 3:5])
    mean = facts.mean(hidden[:, 5:], state)
    torch.testing.assert_close(mean[0, 0], hidden[0, 3:6].mean(0))
    torch.testing.assert_close(mean[0, 2], hidden[0, 5:8].mean(0))


def test_only_values_are_trained():
    assert [name for name, _ in memory().named_parameters()] == ["values"]
