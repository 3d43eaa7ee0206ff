"""Facts are taught to a pretrained model, by a written memory and beside a kNN store."""

from __future__ import annotations

import pytest
import torch

from memlib.config import override

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MEMORY = {
    "memory.kinds": ["facts"],
    "memory.fusion": "residual",
    "memory.memory_layer_placement": "custom",
    "memory.memory_layer_custom": [0, 1],
    "memory.facts.num_facts": 4,
    "memory.facts.threshold": 0.9,  # hidden states of random weights are much alike
    "adapter.base_model_name": "tiny",
    "adapter.width": None,
    "adapter.gate": "none",
}


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from memlib.lab.tiny_base import word_tokenizer

    return word_tokenizer()


@pytest.fixture
def model(peer, tokenizer):
    peer("transformers")
    from .bases import tiny

    return tiny(vocab=len(tokenizer), dtype=torch.float32, hidden_size=64)


@pytest.fixture
def adapter(model):
    from memlib.config import Config
    from memlib.pretrained.adapter import MemoryAdapter

    return MemoryAdapter(override(Config(), MEMORY), model)


@pytest.fixture
def facts():
    from memlib.tasks.facts import make_facts

    return make_facts(4)


def pairs_of(facts, unseen=False):
    return [(prompt, fact.completion) for fact in facts for prompt in fact.prompts(unseen)]


def test_a_batch_is_padded_on_the_left_with_labels_on_completions_only(tokenizer, facts):
    from memlib.pretrained.teaching import IGNORED, batch_of

    pairs = [*pairs_of(facts), ("Mara Lindqvist lives in", " Vienna Rome")]
    batch = batch_of(tokenizer, pairs)
    for row, (prompt, answer) in enumerate(pairs):
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, answer))
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == before + after
        assert batch["labels"][row][real].tolist() == [IGNORED] * len(before) + after
        assert not real[: len(real) - len(before + after)].any()
        assert batch["labels"][row][~real].eq(IGNORED).all()


def test_logits_of_a_batch_are_those_of_each_prompt_alone(model, tokenizer, facts):
    from memlib.pretrained.teaching import answer_logits, recalled

    pairs = pairs_of(facts)
    with torch.no_grad():
        logits, tokens = answer_logits(model, tokenizer, pairs)
        alone = [model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1] for prompt, _ in pairs]
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-4, rtol=1e-4)
    assert tokens.tolist() == [tokenizer(answer)["input_ids"][0] for _, answer in pairs]
    said = [tokenizer.decode(one.argmax()) for one in alone]
    right = [(prompt, f" {word}") for (prompt, _), word in zip(pairs, said, strict=True)]
    assert all(recalled(model, tokenizer, right, batch_size=3))
    assert recalled(model, tokenizer, pairs) == [
        w == a.strip() for w, (_, a) in zip(said, pairs, strict=True)
    ]


def test_keys_are_what_each_memory_sees_at_the_end_of_the_name(adapter, tokenizer, facts):
    from memlib.pretrained.teaching import fact_memories, subject_end, write_facts

    places = write_facts(adapter, tokenizer, [(fact.prompts(), fact.subject) for fact in facts])
    assert places.tolist() == [0, 1, 2, 3]
    for layer, memory in zip((0, 1), fact_memories(adapter), strict=True):
        for f, fact in enumerate(facts):
            for p, prompt in enumerate(fact.prompts()):
                ids, end = subject_end(tokenizer, prompt, fact.subject)
                assert tokenizer.decode(ids[end]) == fact.subject.split()[-1]
                with torch.no_grad():
                    states = adapter.base(torch.tensor([ids]), output_hidden_states=True).hidden_states
                    hidden = adapter.branch(layer).norm(states[layer + 1])[0, : end + 1]
                torch.testing.assert_close(
                    memory.shown[f, p], hidden[-memory.config.window :].mean(0), atol=1e-4, rtol=1e-4
                )


def test_a_prompt_without_its_subject_and_an_adapter_without_facts_are_refused(adapter, model, tokenizer):
    from memlib.config import Config
    from memlib.pretrained.adapter import MemoryAdapter
    from memlib.pretrained.teaching import fact_memories, write_facts

    with pytest.raises(ValueError, match="'Somebody lives in' does not name its subject 'Mara'"):
        write_facts(adapter, tokenizer, [(["Somebody lives in"] * 4, "Mara")])
    plain = MemoryAdapter(override(Config(), MEMORY | {"memory.kinds": []}), adapter.detach())
    with pytest.raises(ValueError, match=r"no fact memory: add facts to memory\.kinds"):
        fact_memories(plain)


def test_teaching_changes_the_values_only_and_leaves_other_text_as_it_was(adapter, tokenizer, facts):
    from memlib.pretrained.teaching import fact_memories, recall, teach, write_facts

    def said(text):
        with torch.no_grad():
            return adapter(torch.tensor([tokenizer(text)["input_ids"]])).logits

    texts = (pairs_of(facts)[0][0], "The password of the door is the word")
    before, untaught = [said(text) for text in texts], recall(adapter, tokenizer, pairs_of(facts))
    frozen = {name: p.clone() for name, p in adapter.named_parameters() if "values" not in name}
    write_facts(adapter, tokenizer, [(fact.prompts(), fact.subject) for fact in facts])
    values = [memory.values for memory in fact_memories(adapter)]
    losses = teach(adapter, values, tokenizer, pairs_of(facts), steps=120, lr=0.5, batch_size=16)
    assert losses[-1] < 0.6 * losses[0]
    assert recall(adapter, tokenizer, pairs_of(facts)) >= untaught + 0.3
    assert all(torch.equal(p, frozen[name]) for name, p in adapter.named_parameters() if name in frozen)
    named, other = (float((said(t) - b).abs().max()) for t, b in zip(texts, before, strict=True))
    assert other < 0.1 * named


def test_a_knn_store_recalls_what_it_was_shown_and_is_the_base_elsewhere(model, tokenizer, facts):
    from memlib.pretrained.knn import NearestNeighbourLM
    from memlib.pretrained.teaching import recall

    neighbours = NearestNeighbourLM(model, threshold=0.999)
    neighbours.write(tokenizer, pairs_of(facts))
    assert len(neighbours.store) == len(pairs_of(facts))
    assert recall(neighbours, tokenizer, pairs_of(facts)) >= 0.9
    assert recall(model, tokenizer, pairs_of(facts)) < 0.5

    ids = torch.tensor([tokenizer(facts[0].statement)["input_ids"]])
    shut = NearestNeighbourLM(model, threshold=2.0)
    shut.write(tokenizer, pairs_of(facts))
    output = shut(ids, labels=ids)
    with torch.no_grad():
        alone = model(ids, labels=ids)
    torch.testing.assert_close(output.logits, alone.logits.log_softmax(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, alone.loss, atol=1e-5, rtol=1e-5)
