"""The pretrained model of a lesson: SmolLM2 from the cache, or else a tiny Llama that is trained here.

The tiny one knows a few hundred words and facts about people of its own. It shows the same mechanics; what it
says about how large models behave is nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from memlib.pretrained.cache import WeightsError
from memlib.pretrained.extras import extra
from memlib.pretrained.fetch import NAME
from memlib.pretrained.teaching import teach
from memlib.pretrained.weights import load_base
from memlib.tasks.facts import FIRST, LAST, RELATIONS, Fact, make_facts

STEPS, PEOPLE = 300, 200


@dataclass(frozen=True)
class LessonModel:
    """A causal language model and its tokenizer; layer: where facts are written; real: whether pretrained."""

    model: Any
    tokenizer: Any
    layer: int
    real: bool


def lesson_model() -> LessonModel:
    """SmolLM2-135M-Instruct if `make model` has fetched it; else a tiny model, trained now, and a notice."""
    try:
        model, tokenizer = load_base(NAME)
    except WeightsError as error:
        print(
            f"No {NAME} here ({error}).\nThis lesson runs on a tiny model instead, trained now in seconds: "
            "the mechanics are the same, its answers are not those of a pretrained model."
        )
        tokenizer = word_tokenizer()
        return LessonModel(trained(tokenizer), tokenizer, 0, False)
    print(f"{NAME}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")
    return LessonModel(model, tokenizer, 12, True)


def word_tokenizer() -> Any:
    """A tokenizer with one token for each word that facts are made of."""
    tokenizers, transformers = extra("tokenizers"), extra("transformers")
    split = tokenizers.pre_tokenizers.Whitespace()
    phrasings = [p for relation in RELATIONS for p in (*relation.taught, *relation.unseen, relation.words)]
    words = [word for text in (FIRST, LAST, *phrasings) for word, _ in split.pre_tokenize_str(text)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["?", ".", *words]))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = split
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token=".")


def trained(tokenizer: Any) -> Any:
    """A Llama of four narrow layers that knows facts about other people than `make_facts(…, 0)` names."""
    transformers = extra("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    taken = {fact.subject for fact in make_facts(100, 0)}
    people = [fact.subject for fact in make_facts(832, 3) if fact.subject not in taken][:PEOPLE]
    draw = random.Random(0)
    facts = [
        Fact(subject, i, draw.choice(relation.answers))
        for subject in people
        for i, relation in enumerate(RELATIONS)
    ]
    pairs = [(p, fact.completion) for fact in facts for p in (*fact.prompts(), *fact.prompts(unseen=True))]
    teach(model, model.parameters(), tokenizer, pairs, STEPS, 3e-3, batch_size=256)
    return model.eval()
