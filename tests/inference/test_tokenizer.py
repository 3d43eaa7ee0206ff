"""Tokenizers: what goes in comes out, also piece by piece."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlib.config import load_config, override
from memlib.inference import ByteTokenizer, WordTokenizer, decode, tokenizer_for
from memlib.tasks import make_task

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(TEXT)
def test_any_text_survives_bytes(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert decode(tokenizer, ids) == text == "".join(tokenizer.pieces(iter(ids)))


def test_a_letter_comes_when_its_last_byte_has_come():
    pieces = list(ByteTokenizer().pieces("aé€".encode()))
    assert pieces == ["a", "", "é", "", "", "€", ""]
    assert decode(ByteTokenizer(), [0xC3]) == "�" == decode(ByteTokenizer(), [300])
    assert decode(ByteTokenizer(), [97, 0, 98]) == "ab"
    with pytest.raises(ValueError, match="zero byte"):
        ByteTokenizer().encode("a\0b")


@pytest.mark.parametrize("name", ["recall", "passkey", "copy", "qa"])
def test_a_task_speaks_in_its_words(name):
    config = override(load_config("tiny"), {"task.name": name, "model.segment_length": 32})
    tokenizer = tokenizer_for(config)
    task = make_task(config.task, 32)
    row = task.batch(1, 0).tokens[0].tolist()
    spoken = " ".join(task.vocabulary.names[token] for token in row)
    assert decode(tokenizer, row) == spoken
    assert decode(tokenizer, tokenizer.encode(spoken)) == spoken
    with pytest.raises(ValueError, match="'hello' is not in this vocabulary: it has _ "):
        tokenizer.encode("hello")


def test_words_of_one_name_and_ids_without_one():
    tokenizer = WordTokenizer(["a", ".", ".", "b"])
    assert tokenizer.encode(" b .\n a") == [3, 1, 0]
    assert decode(tokenizer, [2, 3, 9]) == ". b <9>"


def test_text_needs_no_data():
    gone = override(load_config("text_internal"), {"task.text.dataset": "/nowhere/notes.txt"})
    assert isinstance(tokenizer_for(gone), ByteTokenizer)
