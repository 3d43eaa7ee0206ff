"""Conversations as batches: labels on the assistant's tokens only, whatever the template, and none lost."""

import json
from itertools import islice

import pytest
import torch

from memlib.config import InstructionsConfig
from memlib.tasks.instructions import IGNORED, Instructions, collate, encode, messages_of

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No special token between the speakers: the first token of an answer begins with the space before it.
PLAIN = (
    "{% for m in messages %}{{ {'user': 'Q', 'system': 'S', 'assistant': 'A'}[m['role']] }}: "
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
# As Qwen3's: only the last answer shows that it was thought about.
REWRITES = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}"
)

CONVERSATIONS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one plus one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "and é 漢 🙂?"},
        {"role": "assistant", "content": "🙂 漢 é,\n  it is"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "\n  indented "},
        {"role": "user", "content": "  b  "},
    ],
    [{"role": "user", "content": "say nothing"}, {"role": "assistant", "content": ""}],
]


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def tiny(peer):
    """A byte-level BPE tokenizer, trained here; the token that ends a message is the padding too."""
    transformers = peer("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Offsets without the spaces, as GPT-2's.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello there, two indented assistants: is it brief?"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def characters(template, messages):
    """The text of a conversation and, for each character, whether it is the assistant's; written by hand."""
    text, learned = "", []
    for message in messages:
        answered = message["role"] == "assistant"
        if template == PLAIN:
            head, tail = {"user": "Q: ", "system": "S: ", "assistant": "A: "}[message["role"]], ""
            content = message["content"] + "\n"
        else:
            head, content, tail = f"<|im_start|>{message['role']}\n", message["content"] + "<|im_end|>", "\n"
        text += head + content + tail
        learned += [False] * len(head) + [answered] * len(content) + [False] * len(tail)
    return text, learned


def naive(tokenizer, text, learned):
    """Label a token if one of the bytes that it stands for is the assistant's."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    is_learned = [flag for c, flag in zip(text, learned, strict=True) for _ in c.encode()]
    labels, position = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        length = len(token)  # one character for each byte
        labels.append(any(is_learned[position : position + length]))
        position += length
    assert position == len(is_learned)
    return ids, [i if flag else IGNORED for i, flag in zip(ids, labels, strict=True)]


@pytest.mark.parametrize("template", [CHAT, PLAIN, MARKED], ids=["chat", "plain", "marked"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_labels_are_those_of_a_naive_construction(tiny, template, messages):
    text, learned = characters(template, messages)
    tokenizer = with_template(tiny, template)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    ids, labels = naive(tokenizer, text, learned)
    example = encode(messages, tokenizer, 1000)
    assert example.ids == ids
    assert example.labels == labels
    assert any(label != IGNORED for label in labels)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_labels_of_smollm2_are_those_of_its_messages_one_by_one(smollm2, messages):
    """The ids of each message, from its own text. A header's line break may share a token with a content that
    begins with white space; that token is learned."""
    _, tokenizer = smollm2
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    told = messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]
    ids, labels = [], []
    for message in told:
        head = tokenizer(f"<|im_start|>{message['role']}\n").input_ids
        whole = tokenizer(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>").input_ids
        content = whole[len(head) :] if whole[: len(head)] == head else whole[len(head) - 1 :]
        ids += whole + tokenizer("\n").input_ids
        answered = message["role"] == "assistant"
        labels += [IGNORED] * (len(whole) - len(content))
        labels += (content if answered else [IGNORED] * len(content)) + [IGNORED]
    example = encode(messages, tokenizer, 1000)
    assert example.ids == ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert example.labels == labels


def check_learned(batch, conversations, tokenizer):
    """Each message's end is learned, and nothing of the padding is."""
    ends = tokenizer.eos_token_id
    for row, messages in enumerate(conversations):
        learned = batch["labels"][row]
        answers = sum(message["role"] == "assistant" for message in messages)
        assert (learned == ends).sum() == answers, "an end of message is not learned, or padding is"
        assert (learned[batch["attention_mask"][row] == 0] == IGNORED).all()


def test_padding_is_known_by_its_place_not_by_its_id(tiny):
    tokenizer = with_template(tiny, CHAT)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = [encode(messages, tokenizer, 1000) for messages in CONVERSATIONS]
    batch = collate(examples, tokenizer.pad_token_id)
    longest = max(len(example.ids) for example in examples)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], (4, longest)
    )
    for row, example in enumerate(examples):
        n = len(example.ids)
        assert batch["input_ids"][row, :n].tolist() == example.ids
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (longest - n)
    check_learned(batch, CONVERSATIONS, tokenizer)

    by_id = dict(
        batch, labels=batch["labels"].masked_fill(batch["input_ids"] == tokenizer.pad_token_id, -100)
    )
    with pytest.raises(AssertionError, match="an end of message is not learned"):
        check_learned(by_id, CONVERSATIONS, tokenizer)
    unmasked = dict(batch, labels=torch.where(batch["attention_mask"] == 0, 1, batch["labels"]))
    with pytest.raises(AssertionError):
        check_learned(unmasked, CONVERSATIONS, tokenizer)


def test_the_loss_of_a_padded_batch_is_that_of_its_rows(tiny, peer):
    """Over the labelled tokens of a small Llama; transformers shifts the labels itself."""
    transformers = peer("transformers")
    tokenizer = with_template(tiny, CHAT)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
    )
    model = transformers.LlamaForCausalLM(config).eval()
    examples = [encode(messages, tokenizer, 1000) for messages in CONVERSATIONS]
    total = count = 0
    with torch.no_grad():
        for example in examples:
            row = collate([example], 1)
            n = (row["labels"][:, 1:] != IGNORED).sum()
            total, count = total + model(**row).loss * n, count + n
        both = model(**collate(examples, 1)).loss
    assert both.item() == pytest.approx((total / count).item(), rel=1e-5)


def test_long_examples_are_cut(tiny):
    tokenizer = with_template(tiny, CHAT)
    whole = encode(CONVERSATIONS[1], tokenizer, 1000)
    cut = encode(CONVERSATIONS[1], tokenizer, 30)
    assert (cut.ids, cut.labels) == (whole.ids[:30], whole.labels[:30])


def rows_file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def dataset(tmp_path):
    """14 conversations of different lengths; number 3 has no answer."""
    rows = []
    for i in range(14):
        messages = [{"role": "user", "content": f"number {i}" + " and" * i}]
        if i != 3:
            messages += [{"role": "assistant", "content": f"it is {i}"}] * (i % 2 + 1)
        rows.append({"messages": messages})
    return rows_file(tmp_path, rows)


def equal(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(one, other, strict=True)
    )


OPTIONS = [{}, {"streaming": True, "block": 5}]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_resumed_iterator_is_an_uninterrupted_one(tiny, dataset, options):
    tokenizer = with_template(tiny, CHAT)
    config = InstructionsConfig(dataset=dataset, max_length=300, **options)

    def fresh():
        return Instructions(config, tokenizer, 4, seed=1, epochs=3)

    whole = list(fresh())
    assert sum(len(batch["input_ids"]) for batch in whole) == 3 * 13, "the row without an answer is skipped"
    assert len(whole) == 10 and len(whole[-1]["input_ids"]) == 3
    for read in range(11):
        iterator = fresh()
        assert equal(list(islice(iterator, read)), whole[:read])
        resumed = fresh()
        resumed.load_state_dict(json.loads(json.dumps(iterator.state_dict())))
        assert equal(list(resumed), whole[read:])
        assert resumed.skipped == 3
    with pytest.raises(ValueError, match="batch_size = 4, not 2"):
        Instructions(config, tokenizer, 2, seed=1).load_state_dict(fresh().state_dict())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("epochs", [1, None])
def test_data_without_a_label_is_refused_instead_of_read_forever(tiny, dataset, options, epochs):
    tokenizer = with_template(tiny, CHAT)
    config = InstructionsConfig(dataset=dataset, max_length=5, **options)
    with pytest.raises(ValueError, match=r"no conversation has .* raise task\.instructions\.max_length"):
        next(Instructions(config, tokenizer, 4, epochs=epochs))


def test_prompts_and_responses_are_conversations_of_one_turn(tmp_path):
    row = {"question": "one?", "answer": "two"}
    config = InstructionsConfig(dataset="a.jsonl", prompt_field="question", response_field="answer")
    assert messages_of(row, config) == [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
    ]
    assert messages_of({"messages": CONVERSATIONS[0], **row}, config) == CONVERSATIONS[0]
    with pytest.raises(ValueError, match=r"a\.jsonl has the columns question, answer; name the one"):
        messages_of(row, InstructionsConfig(dataset="a.jsonl"))


@pytest.mark.parametrize(
    "messages", ["text", [{"role": "user"}], [{"role": "user", "content": None}], [["user", "hi"]], None]
)
def test_rows_that_are_not_conversations_are_shown(messages):
    with pytest.raises(ValueError, match="expected a list of messages with the texts `role` and `content`"):
        messages_of({"messages": messages}, InstructionsConfig())


def test_what_a_template_cannot_do_is_said(tiny):
    with pytest.raises(ValueError, match="has no chat template"):
        encode(CONVERSATIONS[0], tiny, 100)
    with pytest.raises(ValueError, match=r"changes earlier text .*mark them with \{% generation %\}"):
        encode(CONVERSATIONS[1], with_template(tiny, REWRITES), 100)
    with pytest.raises(ValueError, match="begins with the assistant"):
        encode(CONVERSATIONS[0][1:], with_template(tiny, CHAT), 100)
    with pytest.raises(ValueError, match=r"refuses .*hello.*: roles must alternate; repair"):
        encode(CONVERSATIONS[0], with_template(tiny, "{{ raise_exception('roles must alternate') }}"), 100)
    assert encode([], with_template(tiny, CHAT), 100).ids == []


def test_the_default_data_is_not_fetched_unless_allowed(tiny):
    with pytest.raises(ValueError, match=r"ultrachat_200k.*set task\.instructions\.download: true"):
        Instructions(InstructionsConfig(), with_template(tiny, CHAT), 4)
