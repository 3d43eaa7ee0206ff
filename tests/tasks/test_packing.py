"""Packed documents: no token is lost or repeated, rows continue, and a resumed iterator misses nothing."""

import json
from itertools import islice

import pytest
import torch

from memlib.config import DocumentsConfig
from memlib.tasks.packing import PackedStream, encode_documents, packed

TEXTS = [f"document {i}:" + f" word{i}" * (i * 7 % 23) + " é漢" for i in range(40)]
EOS = 0


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def tokenizer(peer):
    """Bytes, with a token that ends documents."""
    transformers = peer("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": EOS} | {letter: i for i, letter in enumerate(alphabet, 1)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, "", None]))

    def config_(**options):
        return DocumentsConfig(**({"dataset": str(path), "row_length": 16} | options))

    return config_


STREAM = {"streaming": True, "block": 7}


def naive(tokenizer):
    """All documents one after the other, each by itself."""
    return [i for text in TEXTS for i in [*tokenizer(text, add_special_tokens=False).input_ids, EOS]]


def long_rows(batches):
    """The rows of consecutive batches, put together."""
    return torch.cat([batch["input_ids"] for batch in batches], 1).tolist()


def check_starts(batches):
    """All rows begin anew in the first batch, and none does later."""
    for i, batch in enumerate(batches):
        assert batch["starts"].tolist() == [i == 0] * 3


def test_rows_of_a_stored_text_are_contiguous_parts_of_it(config, tokenizer):
    whole = naive(tokenizer)
    train = whole[: len(whole) - len(whole) // 10]
    rows = packed(config(), tokenizer, batch_size=3, seed=2, epochs=2)
    batches = list(rows)
    assert len(batches) == 2 * rows.batches_per_epoch
    ring = "".join(map(chr, train)) * 2
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        assert [batch["starts"].tolist() for batch in epoch] == [[True] * 3] + [[False] * 3] * (
            len(epoch) - 1
        )
        starts = []
        for row in long_rows(epoch):
            text = "".join(map(chr, row))
            assert text in ring, "a row is a contiguous part of the text"
            starts.append(ring.index(text) % len(train))
        gaps = [(b - a) % len(train) for a, b in zip(starts, [*starts[1:], starts[0]], strict=True)]
        assert min(gaps) >= len(train) // 3 and sum(gaps) == len(train), "and no two overlap"
        assert len(row) > len(train) // 3 - 2 * 16
    assert not torch.equal(batches[0]["input_ids"], batches[len(batches) // 2]["input_ids"])


def test_the_test_split_is_the_last_tenth(config, tokenizer):
    whole = naive(tokenizer)
    rows = packed(config(), tokenizer, 1, split="test")
    assert rows.tokens.tolist() == whole[len(whole) - len(whole) // 10 :]
    assert packed(config(max_tokens=1000), tokenizer, 1).tokens.tolist() == whole[:900]


def test_rows_of_a_stream_are_whole_documents_in_a_row(config, tokenizer):
    batches = list(packed(config(**STREAM), tokenizer, batch_size=3, seed=2, epochs=1))
    assert [batch["starts"].tolist() for batch in batches] == [[True] * 3] + [[False] * 3] * (
        len(batches) - 1
    )
    seen = []
    for row in long_rows(batches):
        texts = "".join(chr(i) for i in row).split(chr(EOS))
        for text in texts[:-1]:
            seen.append(tokenizer.decode([ord(c) for c in text]))
        cut = tokenizer.decode([ord(c) for c in texts[-1]]).rstrip("�")
        assert not cut or any(text.startswith(cut) for text in TEXTS)
    assert len(seen) == len(set(seen)) and set(seen) <= set(TEXTS)
    longest = max(len(text.encode()) for text in TEXTS) + 1
    assert sum(map(len, long_rows(batches))) > len(naive(tokenizer)) - 3 * (16 + longest)


@pytest.mark.parametrize("options", [{}, STREAM], ids=["stored", "stream"])
def test_a_batch_has_no_padding_and_its_labels_are_its_ids(config, tokenizer, options):
    batch = next(packed(config(**options), tokenizer, batch_size=3))
    assert batch["input_ids"].shape == (3, 16) and batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].all() and batch["attention_mask"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])


@pytest.mark.parametrize("options", [{}, STREAM], ids=["stored", "stream"])
def test_a_resumed_iterator_is_an_uninterrupted_one(config, tokenizer, options):
    def fresh(batch_size=3, seed=1):
        return packed(config(**options), tokenizer, batch_size, seed, epochs=3)

    whole = list(fresh())
    for read in (0, 1, 2, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        iterator = fresh()
        assert len(list(islice(iterator, read))) == read
        resumed = fresh()
        resumed.load_state_dict(json.loads(json.dumps(iterator.state_dict())))
        rest = list(resumed)
        assert len(rest) == len(whole) - read
        for ours, theirs in zip(rest, whole[read:], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    state = fresh().state_dict()
    with pytest.raises(ValueError, match="batch_size = 3, not 2; continue with the settings"):
        fresh(batch_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match="seed = 1, not 2"):
        fresh(seed=2).load_state_dict(state)


def test_seeds_give_other_rows(config, tokenizer):
    for options in ({}, STREAM):
        one, other = (next(packed(config(**options), tokenizer, 3, seed))["input_ids"] for seed in (1, 2))
        assert not torch.equal(one, other)


def test_an_end_spelt_out_in_a_document_is_no_end(tokenizer):
    ids = encode_documents(["before <end> after", "two"], tokenizer)
    assert [row.count(EOS) for row in ids] == [1, 1] and all(row[-1] == EOS for row in ids)
    assert tokenizer.decode(ids[0][:-1]) == "before <end> after"


def test_smollm2_packs_the_standard_library(smollm2):
    _, tokenizer = smollm2
    rows = packed(DocumentsConfig(row_length=64, max_tokens=5000), tokenizer, 2, epochs=1)
    text = tokenizer.decode(rows.tokens.tolist())
    assert "import" in text and len(rows.tokens) == 4500
    assert next(rows)["input_ids"].shape == (2, 64)


def test_what_cannot_be_packed_is_said(config, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"\d+ tokens of test text are too few for 50 rows of 16 \+ 1"):
        packed(config(), tokenizer, 50, split="test")
    with pytest.raises(ValueError, match="a stream has no test split"):
        packed(config(**STREAM), tokenizer, 2, split="test")
    with pytest.raises(ValueError, match="python-stdlib is read whole; set it to false"):
        packed(DocumentsConfig(streaming=True), tokenizer, 2)
    with pytest.raises(ValueError, match="split = 'valid'"):
        packed(config(), tokenizer, 2, split="valid")
    for options in ({}, STREAM):
        with pytest.raises(ValueError, match=r"^task\.documents\.text_field = 'body': .* the columns text"):
            next(packed(config(text_field="body", **options), tokenizer, 2))
        with pytest.raises(ValueError, match=r"dataset = 'memlib/none'.*task\.documents\.download: true"):
            packed(config(dataset="memlib/none", **options), tokenizer, 2)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos token"):
        packed(config(), tokenizer, 2)


@pytest.mark.parametrize("epochs", [1, None])
def test_a_stream_without_text_is_refused_instead_of_read_forever(tmp_path, tokenizer, epochs):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n".join(json.dumps({"text": "", "id": i}) for i in range(5)))
    stream = PackedStream(DocumentsConfig(dataset=str(path), **STREAM), tokenizer, 2, epochs=epochs)
    with pytest.raises(ValueError, match="holds no text; choose another"):
        next(stream)
