"""A pretrained model's tokenizer as generation uses it: prompts, conversations, and text while it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from memlib.config import Config
from memlib.tasks.instructions import render

SAID = "⟦said⟧"  # stands for earlier messages, whose text the memory holds


class PretrainedTokenizer:
    """`memlib.inference.Tokenizer` around a tokenizer of transformers.

    stop: the tokens that end a text, by the tokenizer, by the base's generation settings, and by the chat
    template, which may end a message with another one.
    """

    def __init__(self, tokenizer: Any, base: Any = None) -> None:
        self.tokenizer = tokenizer
        settings = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
        named = settings if isinstance(settings, list) else [settings]
        ids = dict.fromkeys([tokenizer.eos_token_id, *named, self.end_of_message()])
        self.stop: tuple[int, ...] = tuple(i for i in ids if i is not None)

    def end_of_message(self) -> int | None:
        """The special token with which the chat template ends the assistant's messages, if any."""
        if not self.tokenizer.chat_template:
            return None
        messages = [{"role": role, "content": SAID} for role in ("user", "assistant")]
        after = self.encode(render(self.tokenizer, messages).rpartition(SAID)[2])
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return after[0] if after and after[0] in special else None

    def encode(self, text: str) -> list[int]:
        """Convert text to ids, without a token that begins a document."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str, chat: bool = False, goes_on: bool = False) -> list[int]:
        """Ids of a prompt: of text to continue, or with `chat` of a user's message up to the answer.

        goes_on: something was said before, so nothing that begins a document or a conversation is added. An
        earlier answer counts as ended. Raises ValueError with `chat` for a tokenizer without a template.
        """
        if not chat:
            return list(self.tokenizer(text, add_special_tokens=not goes_on)["input_ids"])
        if not self.tokenizer.chat_template:
            raise ValueError(
                "--chat: the tokenizer has no chat template, as those of base models; continue plain text "
                "with --no-chat, or set task.instructions.chat_template"
            )
        messages = [{"role": "user", "content": text}]
        if not goes_on:
            return self.encode(render(self.tokenizer, messages, generation_prompt=True))
        before = [{"role": role, "content": SAID} for role in ("user", "assistant")]
        whole = render(self.tokenizer, before + messages, generation_prompt=True)
        turn = whole.split(SAID, 2)[2]
        for token in self.stop:  # the token that ended the answer has been read
            turn = turn.removeprefix(self.tokenizer.decode([token]))
        return self.encode(turn)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Convert tokens to text incrementally; a character of several tokens comes with its last."""
        ids: list[int] = []
        start = shown = 0  # ids[start:shown] is context: some decoders drop the first token's space
        for token in tokens:
            ids.append(token)
            text, known = self.decode(ids[start:]), self.decode(ids[start:shown])
            if len(text) > len(known) and not text.endswith("�"):
                yield text[len(known) :]
                start, shown = shown, len(ids)
        if rest := self.decode(ids[start:])[len(self.decode(ids[start:shown])) :]:
            yield rest

    def decode(self, ids: list[int]) -> str:
        """Convert ids to text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def is_chat_model(config: Config, tokenizer: Any) -> bool:
    """Whether a model is for conversations: trained on them by memlib, or by its name an instruction-tuned
    one; a chat template alone does not say so, as base models may have one."""
    name = (config.adapter.base_model_name or "").lower()
    tuned = any(word in name for word in ("instruct", "chat", "-it"))
    trained = config.training.training_mode == "instruction_finetuning"
    return bool(tokenizer.chat_template) and (tuned or trained)
