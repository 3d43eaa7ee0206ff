"""Teach facts to a pretrained model, and ask for them.

    pairs = [(prompt, completion), …]
    places = write_facts(adapter, tokenizer, [(["Mara lives in", …], "Mara"), …])     the written memory: keys
    teach(adapter, parameters, tokenizer, pairs, steps, lr)                            any arm: its parameters
    recall(adapter, tokenizer, pairs)                                                  how many come first

The loss is taken at the completion's tokens only. A fact counts as recalled where the completion's first
token is the most probable of the whole vocabulary.

Axes: b batch, t tokens, n prompts, f facts, p prompts of a fact, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from memlib.memory.facts import FactMemory
from memlib.models.eval_mode import eval_mode

Pair = tuple[str, str]  # a prompt, and how it goes on
IGNORED = -100


def batch_of(tokenizer: Any, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Prompts with their completions as one batch, padded on the right: input_ids, attention_mask, labels."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in pairs]
    ids, mask = padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    place = torch.arange(ids.shape[1])
    labels = ids.masked_fill((place < rearrange(starts, "b -> b 1")) | (mask == 0), IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor, zeros on the right, and which are real: [b t], [b t]."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < rearrange(lengths, "b -> b 1")
    ids = torch.zeros_like(mask, dtype=torch.int64)
    ids[mask] = torch.tensor([id_ for row in rows for id_ in row])
    return ids, mask.long()


def answer_logits(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """The logits from which each completion's first token is predicted [n v], and that token [n]."""
    batch = batch_of(tokenizer, pairs)
    first = (batch["labels"] != IGNORED).int().argmax(1)
    rows = torch.arange(len(pairs))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[rows, first - 1], batch["labels"][rows, first]


@torch.inference_mode()
def recalled(model: Any, tokenizer: Any, pairs: Sequence[Pair], batch_size: int = 64) -> list[bool]:
    """For each pair, whether the completion's first token is the most probable of all."""
    found: list[bool] = []
    with eval_mode(model):
        for start in range(0, len(pairs), batch_size):
            logits, wanted = answer_logits(model, tokenizer, pairs[start : start + batch_size])
            found += (logits.argmax(-1) == wanted).tolist()
    return found


def recall(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """The share of pairs that are recalled."""
    found = recalled(model, tokenizer, pairs)
    return sum(found) / len(found)


def teach(
    model: Any,
    parameters: Iterable[nn.Parameter],
    tokenizer: Any,
    pairs: Sequence[Pair],
    steps: int,
    lr: float,
    batch_size: int = 50,
    seed: int = 0,
) -> list[float]:
    """Train parameters on the pairs with AdamW and a linearly falling rate; returns the losses.

    Batches go through the pairs in a new order each time. Only the given parameters change.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses: list[float] = []
    model.train()
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        picked, order = order[:batch_size], order[batch_size:]
        loss = model(**batch_of(tokenizer, [pairs[i] for i in picked])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def fact_memories(adapter: Any) -> list[FactMemory]:
    """The adapter's fact memories, in layer order; ValueError if it has none."""
    found = [module for module in adapter.modules() if isinstance(module, FactMemory)]
    if not found:
        raise ValueError("this adapter has no fact memory: add facts to memory.kinds")
    return found


@torch.no_grad()
def write_facts(adapter: Any, tokenizer: Any, facts: Sequence[tuple[Sequence[str], str]]) -> Tensor:
    """Write facts into every fact memory: [f], their places, the same in each.

    facts: for each, prompts that name the subject (memory.facts.keys_per_fact of them), and the subject. The
    keys are what the memory sees at the subject's last token. Values start at zero: `teach` trains them.
    Raises ValueError for a prompt without its subject.
    """
    found = [subject_end(tokenizer, prompt, subject) for many, subject in facts for prompt in many]
    memories = fact_memories(adapter)
    means: list[list[Tensor]] = [[] for _ in memories]
    seen: list[Tensor] = []
    for memory in memories:
        memory.mean_point.listeners.append(seen.append)
    with eval_mode(adapter):
        for start in range(0, len(found), 50):
            part = found[start : start + 50]
            ids, mask = padded([ids for ids, _ in part])
            seen.clear()
            adapter(ids, attention_mask=mask)
            pieces = len(seen) // len(memories)  # a prompt longer than a segment is read in pieces
            rows, places = torch.arange(len(part)), torch.tensor([place for _, place in part])
            for i, many in enumerate(means):
                many.append(torch.cat(seen[i * pieces : (i + 1) * pieces], 1)[rows, places])
    for memory in memories:
        memory.mean_point.listeners.remove(seen.append)
    written = [
        memory.write_facts(rearrange(torch.cat(many), "(f p) d -> f p d", f=len(facts)))
        for memory, many in zip(memories, means, strict=True)
    ]
    return written[0]


def subject_end(tokenizer: Any, prompt: str, subject: str) -> tuple[list[int], int]:
    """A prompt's ids, and the place of the last token of the first mention of its subject."""
    start = prompt.find(subject)
    if start < 0:
        raise ValueError(f"{prompt!r} does not name its subject {subject!r}")
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    ends = [i for i, (begin, _) in enumerate(encoded["offset_mapping"]) if begin < start + len(subject)]
    return encoded["input_ids"], ends[-1]
