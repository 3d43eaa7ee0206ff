"""Pretrained tokenizers in generation: pieces are the whole text, stops end it, turns follow turns."""

import pytest

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

from types import SimpleNamespace

from memlib.config import Config, override
from memlib.pretrained.tokenizer import PretrainedTokenizer, is_chat_model

from .bases import CHAT, byte_tokenizer

OTHER_END = CHAT.replace("<end>", "<turn>")


@pytest.mark.parametrize(
    "text", ["plain words", " a space first", "é漢🙂 and é", "🙂", "", "line\n\nline  two "]
)
def test_pieces_together_are_the_text_and_no_character_is_broken(text):
    tokenizer = PretrainedTokenizer(byte_tokenizer())
    pieces = list(tokenizer.pieces(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces) and all(pieces)
    assert len(pieces) == len(text)  # each as soon as it is complete


def test_an_unfinished_character_is_shown_at_the_end():
    tokenizer = PretrainedTokenizer(byte_tokenizer())
    assert list(tokenizer.pieces(tokenizer.encode("a漢")[:-1])) == ["a", "�"]


def test_a_piece_comes_before_the_next_token_is_asked_for():
    tokenizer = PretrainedTokenizer(byte_tokenizer())
    asked = []

    def ids():
        for i in tokenizer.encode("abc"):
            asked.append(i)
            yield i

    for number, _ in enumerate(tokenizer.pieces(ids()), 1):
        assert len(asked) == number


def test_stops_are_those_of_tokenizer_base_and_template():
    """A template may end messages with a token that is not eos, as Qwen's base models' does."""
    base = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[0, 7]))
    assert PretrainedTokenizer(byte_tokenizer()).stop == (0,)
    assert PretrainedTokenizer(byte_tokenizer(), base).stop == (0, 7)
    own = byte_tokenizer(OTHER_END)
    own.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    assert PretrainedTokenizer(own).stop == (0, own.convert_tokens_to_ids("<turn>"))
    assert PretrainedTokenizer(byte_tokenizer(OTHER_END)).stop == (0,)  # ordinary text there


def test_a_turn_follows_earlier_turns_without_what_begins_a_conversation():
    system = "{% if messages[0]['role'] == 'user' %}<system>Be kind.<end>{% endif %}" + CHAT
    tokenizer = PretrainedTokenizer(byte_tokenizer(system))

    def shown(goes_on):
        return tokenizer.tokenizer.decode(tokenizer.prompt("hi", chat=True, goes_on=goes_on))

    assert shown(False) == "<system>Be kind.<end><user>hi<end><assistant>"
    assert shown(True) == "<user>hi<end><assistant>"


@pytest.mark.parametrize(
    ("name", "mode", "template", "expected"),
    [
        ("smollm2-135m-instruct", "facts", CHAT, True),
        ("Qwen/Qwen2.5-1.5B", "pretraining", CHAT, False),  # a base model that comes with a template
        ("Qwen/Qwen2.5-1.5B", "instruction_finetuning", CHAT, True),
        ("some/model-instruct", "pretraining", None, False),
    ],
)
def test_models_for_conversations_are_known(name, mode, template, expected):
    config = override(Config(), {"adapter.base_model_name": name, "training.training_mode": mode})
    assert is_chat_model(config, byte_tokenizer(template)) is expected
