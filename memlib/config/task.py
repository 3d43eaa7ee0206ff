"""Options of the tasks. A task adds itself with one dataclass and one field of `TaskConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlib.config.fields import option


@dataclass(kw_only=True)
class RecallConfig:
    """Associative recall across segments: key-value pairs early, queries in the last segment."""

    num_pairs: int = option(4, "key-value pairs shown", 1)
    num_queries: int | None = option(None, "pairs asked in the last segment; all if null", 1)
    num_keys: int = option(16, "distinct keys", 2)
    num_values: int = option(16, "distinct values; chance is 1 / num_values", 2)
    num_fillers: int = option(16, "distinct distractor tokens", 1)
    rewrites: int = option(0, "pairs shown again with a new value; the last value counts", 0)


@dataclass(kw_only=True)
class PasskeyConfig:
    """A key of several digits hidden in noise; the last segment asks for it."""

    num_digits: int = option(2, "digits of the key", 1)
    num_symbols: int = option(10, "symbols a digit is drawn from", 2)
    num_fillers: int = option(32, "distinct noise tokens", 1)
    depth: float | None = option(
        None, "position of the key. 0: first segment; 1: last before the query; null: random", 0, 1
    )


@dataclass(kw_only=True)
class MixedConfig:
    """Many facts shown once and a few registers set repeatedly; the last segment asks for both."""

    num_facts: int = option(16, "facts shown", 1)
    num_fact_keys: int = option(32, "distinct keys of facts", 1)
    num_registers: int = option(4, "registers", 1)
    num_settings: int = option(3, "times each register is set; the last value counts", 1)
    fact_queries: int = option(3, "facts asked in the last segment", 1)
    register_queries: int = option(2, "registers asked in the last segment", 1)
    num_values: int = option(16, "distinct values; chance is 1 / num_values", 2)
    num_fillers: int = option(16, "distinct distractor tokens", 1)


@dataclass(kw_only=True)
class TopicsConfig:
    """Streams about topics; each topic has a fixed value for each key, the same in the whole corpus."""

    num_topics: int = option(8, "topics; chance is 1 / num_topics", 1)
    num_words: int = option(4, "words of each topic", 1, 26)
    num_keys: int = option(16, "distinct keys, asked in every topic", 1)
    num_values: int = option(16, "distinct values", 2)
    num_queries: int = option(4, "facts asked in a segment", 1)
    change: float = option(0.0, "probability that a segment has another topic than the one before", 0.0, 1.0)
    facts_seed: int = option(0, "seed of the corpus's facts", 0)


@dataclass(kw_only=True)
class CopyConfig:
    """Copying: the last segment repeats the first segment's symbols in order."""

    num_items: int = option(4, "symbols to copy", 1)
    num_symbols: int = option(16, "distinct symbols", 2)
    num_fillers: int = option(16, "distinct noise tokens", 1)
    selective: bool = option(
        False, "scatter the symbols over all segments but the last, between noise tokens"
    )


@dataclass(kw_only=True)
class QaConfig:
    """bAbI-style stories: people move and carry things; questions with 1-3 supporting facts."""

    supporting_facts: int = option(1, "facts needed for an answer", 1, 3)
    num_people: int = option(4, "people in the world", 2, 8)
    num_places: int = option(6, "places; chance is 1 / num_places (1 / (num_places - 1) for 3 facts)", 2, 8)
    num_objects: int = option(3, "things that can be carried", 1, 6)
    distractors: int = option(2, "irrelevant sentences for each fact", 0)


@dataclass(kw_only=True)
class TextConfig:
    """Real text as bytes; unless `documents` says otherwise, each row of a batch continues its own stream
    from batch to batch."""

    dataset: str = option(
        "python-stdlib",
        "python-stdlib (offline), a local file or folder, or a hub dataset name",
        known_as="dataset_name",
    )
    subset: str | None = option(None, "the hub dataset's configuration", known_as="dataset_subset")
    split: str = option("train", "split of a hub dataset to read", known_as="dataset_split")
    text_field: str = option("text", "column that holds the text")
    max_bytes: int = option(4_000_000, "bytes to read at most", 1000)
    documents: Literal["joined", "lanes", "buckets"] = option(
        "joined",
        "joined: one text, of which each row reads its own part, and memory passes from document to "
        "document; lanes: each row reads whole documents, one after another, and memory starts anew with "
        "each; buckets: each row is a document, or a piece of `segments` segments, in batches of similar "
        "length with at most batch_size x segments segments",
    )
    download: bool = option(False, "allow fetching a hub dataset that is not in the local cache")


@dataclass(kw_only=True)
class SourceConfig:
    """A data set for pretrained models: local files, or a data set of the hub."""

    dataset: str = option("", "a local file or folder, or a hub dataset name")
    subset: str | None = option(None, "the hub dataset's configuration", known_as="dataset_subset")
    split: str = option("train", "split of a hub dataset to read", known_as="dataset_split")
    download: bool = option(False, "allow fetching a hub dataset that is not in the local cache")
    streaming: bool = option(False, "read the data in order, a block at a time, instead of loading it whole")
    block: int = option(1000, "with streaming: rows of a block, which are shuffled among themselves", 1)


@dataclass(kw_only=True)
class InstructionsConfig(SourceConfig):
    """Conversations for instruction tuning; only the assistant's tokens are learned."""

    dataset: str = option(
        "HuggingFaceH4/ultrachat_200k",
        "a local file or folder (.jsonl, .parquet, …), or a hub dataset name",
        known_as="dataset_name",
    )
    split: str = option("train_sft", "split of a hub dataset to read", known_as="dataset_split")
    messages_field: str = option("messages", "column with conversations: lists of {role, content}")
    prompt_field: str = option("prompt", "column with prompts, if there is no messages_field")
    response_field: str = option("response", "column with answers, if there is no messages_field")
    chat_template: str | None = option(
        None, "Jinja template of a conversation, for models without one; null: the tokenizer's own"
    )
    max_length: int = option(2048, "tokens of an example; the rest is cut off", 2)


@dataclass(kw_only=True)
class DocumentsConfig(SourceConfig):
    """Documents for continued pretraining, joined and cut into rows of equal length."""

    dataset: str = option(
        "python-stdlib",
        "python-stdlib (offline), a local file or folder, or a hub dataset name",
        known_as="dataset_name",
    )
    text_field: str = option("text", "column that holds the text")
    row_length: int = option(1024, "tokens of a row", 2)
    max_tokens: int = option(4_000_000, "without streaming: tokens to read at most", 1000)


@dataclass(kw_only=True)
class TaskConfig:
    """The task that the model is trained and measured on; `training.training_mode` chooses for a pretrained
    base, whose data are `instructions` or `documents`."""

    name: Literal["recall", "passkey", "mixed", "topics", "copy", "qa", "text"] = option("recall", "the task")
    segments: int = option(4, "segments in an example; with segments_min, the maximum", 1)
    segments_min: int | None = option(None, "training draws the length from segments_min … segments", 1)
    recall: RecallConfig = option(RecallConfig, "associative recall")
    passkey: PasskeyConfig = option(PasskeyConfig, "passkey hidden in noise")
    mixed: MixedConfig = option(MixedConfig, "facts and registers")
    topics: TopicsConfig = option(TopicsConfig, "facts of topics")
    copy: CopyConfig = option(CopyConfig, "copy and selective copy")
    qa: QaConfig = option(QaConfig, "stories and questions")
    text: TextConfig = option(TextConfig, "real text")
    instructions: InstructionsConfig = option(
        InstructionsConfig, "conversations for a pretrained base, with training_mode: instruction_finetuning"
    )
    documents: DocumentsConfig = option(
        DocumentsConfig, "documents for a pretrained base, with training_mode: pretraining"
    )
