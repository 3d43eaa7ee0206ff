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
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.memory.facts import FactMemory
from memlib.models.eval_mode import eval_mode
from memlib.tasks.instructions import IGNORED

Pair = tuple[str, str]  # a prompt, and how it goes on


def batch_of(tokenizer: Any, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Prompts with their completions as one batch, padded on the left: input_ids, attention_mask, labels."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in pairs]
    ids, mask = padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    from_end = torch.arange(ids.shape[1]).flip(0)
    lengths = torch.tensor([len(answer) for answer in answers])
    labels = ids.masked_fill(from_end >= rearrange(lengths, "b -> b 1"), IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor, zeros on the left, and which are real: [b t], [b t]."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())).flip(0) < rearrange(lengths, "b -> b 1")
    ids = torch.zeros_like(mask, dtype=torch.int64)
    ids[mask] = torch.tensor([id_ for row in rows for id_ in row])
    return ids, mask.long()


def completion_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    """Logits [b t v] of the last tokens, of which the completions are predicted; their labels [b t], shifted;
    and the model's output."""
    count = int((batch["labels"] != IGNORED).sum(1).max())
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=count + 1)
    return output.logits[:, :-1], batch["labels"][:, -count:], output


def answer_logits(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """The logits from which each completion's first token is predicted [n v], and that token [n]."""
    logits, labels, _ = completion_logits(model, batch_of(tokenizer, pairs))
    rows, first = torch.arange(len(pairs)), (labels != IGNORED).int().argmax(1)
    return logits[rows, first], labels[rows, first]


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
        logits, labels, output = completion_logits(model, batch_of(tokenizer, [pairs[i] for i in picked]))
        loss = F.cross_entropy(rearrange(logits, "b t v -> (b t) v"), rearrange(labels, "b t -> (b t)"))
        loss = loss + sum((getattr(output, "router_losses", None) or {}).values())
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
    with eval_mode(adapter):
        for start in range(0, len(found), 50):
            part = found[start : start + 50]
            ids, mask = padded([ids for ids, _ in part])
            seen: list[list[Tensor]] = [[] for _ in memories]  # several, of a prompt longer than a segment
            with ExitStack() as stack:
                for memory, pieces in zip(memories, seen, strict=True):
                    stack.enter_context(memory.mean_point.listening(pieces.append))
                adapter(ids, attention_mask=mask)
            rows = torch.arange(len(part))
            places = torch.tensor([ids.shape[1] - len(row) + place for row, place in part])
            for many, pieces in zip(means, seen, strict=True):
                many.append(torch.cat(pieces, 1)[rows, places])
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
