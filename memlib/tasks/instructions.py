"""Instruction tuning: conversations as token ids, with labels on the assistant's tokens only.

Axes: b batch, t tokens, padded on the right to the longest example of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlib.config import InstructionsConfig
from memlib.models.checks import IGNORED as IGNORED
from memlib.tasks.row_stream import Row, RowStream, check_same

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "task.instructions"
MARKS_ASSISTANT = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One conversation: token ids, and a label for each, IGNORED outside the assistant's messages."""

    ids: list[int]
    labels: list[int]


class Instructions(Iterator[dict[str, Tensor]]):
    """Batches of conversations: {"input_ids", "attention_mask", "labels"}, each [b t] int64.

    labels: as transformers expects them, not shifted: the id itself where the assistant speaks, else -100
    attention_mask: 1 for tokens, 0 for padding

    Padding is known by its position, not by its id: in many tokenizers the pad token is also the token that
    ends a message, which must be learned. Examples longer than `max_length` are cut; those without any label
    are skipped and counted in `skipped`. The last batch of the last epoch may be smaller.

    `state_dict` and `load_state_dict` save and restore the position; a resumed iterator yields exactly the
    batches that would have followed.

    epochs: passes over the data; None: no end

    Raises ValueError for data that is missing, cannot be read, or has no example with a label, and for a
    tokenizer without a chat template.
    """

    def __init__(
        self,
        config: InstructionsConfig,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = None,
    ) -> None:
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.rows = RowStream(config, FIELD, seed, epochs)
        self.skipped = 0
        self.last_used = -1  # the latest epoch with an example

    def __next__(self) -> dict[str, Tensor]:
        examples: list[Example] = []
        while len(examples) < self.batch_size and (row := next(self.rows, None)) is not None:
            example = encode(messages_of(row, self.config), self.tokenizer, self.config.max_length)
            if any(label != IGNORED for label in example.labels):
                examples.append(example)
                self.last_used = self.rows.epoch
            else:
                self.skipped += 1
                self._check_used(self.rows.epoch - 1)
        if not examples:
            self._check_used(self.rows.epoch - 1)
            raise StopIteration
        return collate(examples, self.tokenizer.pad_token_id or 0)

    def state_dict(self) -> dict[str, Any]:
        """The position, as values that JSON can hold."""
        return {
            "batch_size": self.batch_size,
            "skipped": self.skipped,
            "last_used": self.last_used,
            "rows": self.rows.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; raises ValueError if it belongs to other data or settings."""
        check_same(state, {"batch_size": self.batch_size}, FIELD)
        self.rows.load_state_dict(state["rows"])
        self.skipped, self.last_used = state["skipped"], state["last_used"]

    def _check_used(self, epoch: int) -> None:
        """Raise ValueError if a complete epoch had no example with a label: the iterator would never end."""
        if self.last_used < epoch:
            raise ValueError(
                f"{FIELD}.dataset = {self.config.dataset!r}: no conversation has a token of the assistant in "
                f"its first {self.config.max_length} tokens; raise {FIELD}.max_length or use other data"
            )


def messages_of(row: Row, config: InstructionsConfig) -> list[Message]:
    """The conversation of a row: its messages, or its prompt and response.

    Raises ValueError if the row has neither, or if they are not text.
    """
    if config.messages_field in row:
        messages = row[config.messages_field]
    elif config.prompt_field in row and config.response_field in row:
        messages = [
            {"role": "user", "content": row[config.prompt_field]},
            {"role": "assistant", "content": row[config.response_field]},
        ]
    else:
        raise ValueError(
            f"{FIELD}.messages_field = {config.messages_field!r}: {config.dataset} has the columns "
            f"{', '.join(row)}; name the one with conversations, or {FIELD}.prompt_field and "
            f"{FIELD}.response_field"
        )
    if not isinstance(messages, list) or not all(is_message(message) for message in messages):
        raise ValueError(
            f"{FIELD}.dataset = {config.dataset!r}: expected a list of messages with the texts `role` and "
            f"`content`, found {shortened(messages)}; repair the row or name other columns"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def is_message(message: Any) -> bool:
    """Whether this is a mapping with a role and a content that are text."""
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Apply a tokenizer's chat template and label the assistant's tokens.

    Labelled are the assistant's contents and the token that ends each of them, not the headers. If the
    template marks its assistant parts with {% generation %}, these marks decide; else the text that each of
    the assistant's messages adds to the conversation before it.

    Raises ValueError for a tokenizer without a chat template or without offsets, for messages that the
    template refuses, and for a template without marks that changes earlier text when messages follow.
    """
    if not messages:
        return Example([], [])
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer has no chat template, as those of base models; set {FIELD}.chat_template, or "
            "use an instruction-tuned model"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character positions, which labels need; use a fast "
            "tokenizer"
        )
    if MARKS_ASSISTANT.search(tokenizer.get_chat_template()):
        with refusals(messages):
            marked: Any = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        ids, learned = marked["input_ids"], [bool(mask) for mask in marked["assistant_masks"]]
    else:
        ids, learned = encode_by_prefix(messages, tokenizer)
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    return Example(ids[:max_length], labels[:max_length])


def encode_by_prefix(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant's messages add."""
    text = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, learned = encoded["input_ids"], [False] * len(encoded["input_ids"])
    offsets = encoded["offset_mapping"]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ValueError("a conversation begins with the assistant; put the user's message before it")
        before = render(tokenizer, messages[:i], generation_prompt=True)
        until = render(tokenizer, messages[: i + 1])
        if not (until.startswith(before) and text.startswith(until)):
            raise ValueError(
                "the chat template changes earlier text when messages follow, so the assistant's tokens "
                "cannot be told from it; mark them with {% generation %} … {% endgeneration %} in "
                "tokenizer.chat_template, or use conversations of one turn"
            )
        span = [j for j, (a, z) in enumerate(offsets) if a < len(until) and z > len(before)]
        for j in without_trailing_space(span, ids, tokenizer):
            learned[j] = True
    return ids, learned


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool = False
) -> str:
    """Apply the chat template; raises ValueError if it refuses the messages."""
    with refusals(messages):
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        )


@contextmanager
def refusals(messages: Sequence[Message]) -> Iterator[None]:
    """Turn an error of a chat template into a ValueError that shows the messages."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses {shortened(messages)}: {error}; repair the data or the template"
        ) from error


def without_trailing_space(
    span: list[int], ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Drop the space that a template puts after the token that ends a message; it is never generated."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = list(span)
    while kept and ids[kept[-1]] not in special:
        if str(tokenizer.decode([ids[kept[-1]]])).strip():
            return span  # no special token ends this message, so the space may be its end
        kept.pop()
    return kept or span


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Pad examples on the right to the longest; the mask is made from lengths, never from ids."""
    longest = max(len(example.ids) for example in examples)
    missing = [longest - len(example.ids) for example in examples]
    rows = list(zip(examples, missing, strict=True))
    return {
        "input_ids": torch.tensor([example.ids + [pad] * m for example, m in rows]),
        "attention_mask": torch.tensor([[1] * len(example.ids) + [0] * m for example, m in rows]),
        "labels": torch.tensor([example.labels + [IGNORED] * m for example, m in rows]),
    }


def shortened(value: Any) -> str:
    """A value in at most 200 characters, for error messages."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
