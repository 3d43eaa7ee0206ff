"""An adapter in lm-evaluation-harness: the numbers of a hand-written loop, and of lm-eval's own class."""

import importlib
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from memlib.models import MemoryTransformer

from ..laws.cases import SEGMENT, VOCAB, Case, variants
from .bases import adapter, ids, tiny

END = 2
WORDS = [f"w{i}" for i in range(VOCAB)]


@pytest.fixture(autouse=True)
def needs_lm_eval(lacking, monkeypatch):
    if importlib.util.find_spec("lm_eval") is None:
        lacking("lm_eval", "make evaluation")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tokenizer():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w2")
    made.name_or_path = "words"
    return made


def text(row):
    return " ".join(WORDS[i] for i in row)


QUESTIONS = [  # of different lengths, over segment borders
    {
        "question": text(ids(1, 3 + 4 * i % 11, seed=i)[0]),
        "choices": [text(ids(1, 1 + j % 3, seed=9 + i + j)[0]) for j in range(4)],
        "answer": i % 4,
    }
    for i in range(10)
]
DOCUMENTS = [{"text": text(ids(1, 5 + 7 * i, seed=i)[0])} for i in range(5)]


def run(lm, rows, tmp_path, **task):
    """The results of a local task, and its samples by document."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "local", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return found["results"]["local"], samples


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
PERPLEXITY = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
CONTINUE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["w5"], "max_gen_toks": 9},
    "metric_list": [{"metric": "exact_match"}],
}


def encode(words):
    return [WORDS.index(word) for word in words.split()]


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """One forward pass over one row: the sum of the continuation's log-probabilities."""
    row = torch.tensor([context + continuation])
    values = model(row).logits[0, :-1].log_softmax(-1)[range(row.shape[1] - 1), row[0, 1:]]
    return float(values[-len(continuation) :].sum())


MODELS = {
    "full": lambda: adapter(use_lora=True),
    "segment": lambda: adapter(mode="segment"),
    "memlib": lambda: Case("internal", {}, {"internal": variants("internal")[0]}).build(),
}


def every(name, values):
    return pytest.mark.parametrize(name, values, ids=str)


@every("piece", [512, 3])
@every("which", MODELS)
def test_multiple_choice_is_a_hand_written_loop(which, piece, tokenizer, tmp_path, monkeypatch):
    from memlib.pretrained import lm_eval

    monkeypatch.setattr(lm_eval, "PIECE", piece)
    model = MODELS[which]()
    results, samples = run(lm_eval.AdapterLM(model, tokenizer, batch_size=7), QUESTIONS, tmp_path, **CHOICE)
    right = 0
    for row, sample in zip(QUESTIONS, samples, strict=True):
        want = [log_likelihood(model, encode(row["question"]), encode(choice)) for choice in row["choices"]]
        got = [float(response[0]) for response in sample["filtered_resps"]]
        assert got == pytest.approx(want, abs=1e-9)
        right += max(range(4), key=want.__getitem__) == row["answer"]
    assert results["acc,none"] == pytest.approx(right / len(QUESTIONS))


@every("which", MODELS)
def test_perplexity_is_a_hand_written_loop(which, tokenizer, tmp_path):
    from memlib.pretrained.lm_eval import AdapterLM

    model = MODELS[which]()
    results, samples = run(AdapterLM(model, tokenizer, batch_size=2), DOCUMENTS, tmp_path, **PERPLEXITY)
    want = [log_likelihood(model, [END], encode(row["text"])) for row in DOCUMENTS]
    got = [float(sample["filtered_resps"][0]) for sample in samples]
    assert got == pytest.approx(want, abs=1e-9)
    words = sum(len(row["text"].split()) for row in DOCUMENTS)
    expected = torch.tensor(-sum(want) / words).exp()
    assert results["word_perplexity,none"] == pytest.approx(float(expected), rel=1e-6)


@every("which", MODELS)
def test_generation_is_a_hand_written_loop(which, tokenizer, tmp_path):
    from memlib.pretrained.lm_eval import AdapterLM

    model = MODELS[which]()
    _, samples = run(AdapterLM(model, tokenizer, batch_size=4), QUESTIONS, tmp_path, **CONTINUE)
    lengths = set()
    for row, sample in zip(QUESTIONS, samples, strict=True):
        tokens = encode(row["question"])
        start = len(tokens)
        with torch.no_grad():
            while len(tokens) < start + 9:
                token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
                if token in (END, 5):
                    break
                tokens.append(token)
        assert encode(sample["resps"][0][0]) == tokens[start:]
        lengths.add(len(tokens) - start)
    assert len(lengths) > 1


def test_a_new_adapter_has_the_numbers_of_lm_evals_own_class(tokenizer, tmp_path):
    """HFLM on the base alone: multiple choice, perplexity and generated texts."""
    from lm_eval.models.huggingface import HFLM

    from memlib.pretrained.lm_eval import AdapterLM

    base = tiny(dtype=torch.float32, max_position_embeddings=16)
    for task, rows in ((CHOICE, QUESTIONS), (PERPLEXITY, DOCUMENTS), (CONTINUE, QUESTIONS)):
        hflm = HFLM(base, tokenizer=tokenizer, batch_size=3, max_length=16)
        theirs, want = run(hflm, rows, tmp_path, **task)
        model = adapter(base=base, stirred=False)
        ours, got = run(AdapterLM(model, tokenizer, batch_size=3), rows, tmp_path, **task)
        model.detach()
        assert ours.keys() == theirs.keys()
        for mine, other in zip(got, want, strict=True):
            if task is CONTINUE:
                assert mine["resps"] == other["resps"]
            else:
                assert values(mine) == pytest.approx(values(other), abs=1e-4)


def values(sample):
    """The log-likelihoods of a sample, and 1 or 0 for whether each is that of a greedy text."""
    return [float(json.loads(str(value).lower())) for value in np.ravel(sample["filtered_resps"])]


def test_samples_depend_on_the_seed_and_not_on_the_batch(tokenizer):
    from lm_eval.api.instance import Instance

    from memlib.pretrained.lm_eval import AdapterLM

    options = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8, "until": []}
    requests = [
        Instance("generate_until", row, (row["question"], options), i) for i, row in enumerate(QUESTIONS)
    ]
    model = adapter()
    first = AdapterLM(model, tokenizer, batch_size=10).generate_until(requests)
    assert AdapterLM(model, tokenizer, batch_size=3).generate_until(requests) == first
    assert AdapterLM(model, tokenizer, batch_size=3, seed=1).generate_until(requests) != first
    bad = [Instance("generate_until", {}, ("w1", {"num_beams": 3}), 0)]
    with pytest.raises(ValueError, match="generation option 'num_beams': known are do_sample"):
        AdapterLM(model, tokenizer).generate_until(bad)


def test_limits_and_refusals(tokenizer):
    from memlib.pretrained.lm_eval import AdapterLM

    assert AdapterLM(adapter(), tokenizer).max_length == 512
    assert AdapterLM(adapter(mode="segment"), tokenizer).max_length is None
    model = MODELS["memlib"]()
    assert isinstance(model, MemoryTransformer) and AdapterLM(model, tokenizer).max_length is None
    short = AdapterLM(model, tokenizer, max_length=SEGMENT)
    row = [1, 3, 4, 5, 6, 7, 8]
    [(value, _)] = short._loglikelihood_tokens([(None, row, [9])])
    assert value == pytest.approx(log_likelihood(model, row[-SEGMENT:], [9]))
    with pytest.raises(ValueError, match="max_gen_toks = 256 leaves no room for a prompt: max_length = 4"):
        short.generate([("w1", {})])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no eos_token: set tokenizer.eos_token"):
        AdapterLM(model, tokenizer)
