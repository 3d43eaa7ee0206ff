"""Ablations of a hybrid model: accuracy without each part, and searches saved by its retrieval gate.

Axes: b batch, t tokens of the stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from memlib.memory.external.memory import Decision, ExternalMemory
from memlib.models import MemoryTransformer
from memlib.models.eval_mode import eval_mode
from memlib.models.fusion import SoftmaxFusion
from memlib.tasks import Batch, Task

Plan = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Measured:
    """Accuracy by the family of the asked token; searched: the part of all tokens that was searched for;
    cpu_seconds: of the whole pass, to be compared with another row's only."""

    name: str
    accuracy: dict[str, float]
    searched: float
    cpu_seconds: float


def measure_hybrid(model: MemoryTransformer, task: Task, family: str, examples: int = 256) -> list[Measured]:
    """The whole, each part left out, and other ways to decide who is searched for.

    family: the one of the task's vocabulary that needs retrieval, as the oracle's gate knows.

    | row                    | what it is                                                       |
    | learned                | the model as it is                                               |
    | without internal, …    | one source shut in the fusion, the others share its weight       |
    | always, never          | every token is searched for, none                                |
    | oracle                 | tokens of the family are, and no others                          |
    | by lot                 | as many as the learned gate asks for, at random: the control     |

    Raises ValueError for a model that is no hybrid with a retrieval gate.
    """
    if not gated(model):
        raise ValueError(
            "this model has no retrieval gate: set memory.kinds: [internal, external] and "
            "memory.external.retrieval_gate: query"
        )
    learned = measure(model, task, "learned", examples)
    rows = [learned]
    for source, kind in enumerate(model.config.memory.kinds, 1):
        with left_out(model, source):
            rows.append(measure(model, task, f"without {kind}", examples))
    needed = task.vocabulary[family]
    lots = torch.Generator().manual_seed(0)
    plans: dict[str, Plan] = {
        "always": lambda batch: torch.ones_like(batch.scored),
        "oracle": lambda batch: of_family(batch.tokens, needed),
        "by lot": lambda batch: torch.rand(batch.scored.shape, generator=lots) < learned.searched,
        "never": lambda batch: torch.zeros_like(batch.scored),
    }
    return rows + [measure(model, task, name, examples, plan) for name, plan in plans.items()]


def measure(
    model: MemoryTransformer, task: Task, name: str, examples: int = 256, plan: Plan | None = None
) -> Measured:
    """One row; with a plan, its word counts instead of the gates': who is searched for, [b t] true."""
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    searched = total = 0
    batch_size, n, seconds = min(64, examples), task.segment_length, 0.0
    with eval_mode(model), torch.no_grad():
        for step in range(-(-examples // batch_size)):
            batch = task.batch(batch_size, step, split="test")
            planned, state, hits = plan(batch) if plan else None, None, []
            for start in range(0, batch.tokens.shape[1], n):
                part = slice(start, start + n)
                asked_for = None if planned is None else planned[:, part]
                with decided(model, asked_for) as heard:
                    before = time.process_time()
                    output = model(batch.tokens[:, part], memory_state=state)
                    seconds += time.process_time() - before
                state = output.memory_state
                hits.append(output.logits.argmax(-1) == batch.targets[:, part])
                searched += sum(int(search.sum()) for search in heard)
                total += sum(search.numel() for search in heard)
            for family, count, good in tally(task, batch, torch.cat(hits, 1)):
                asked[family] = asked.get(family, 0) + count
                right[family] = right.get(family, 0) + good
    accuracy = {family: right[family] / asked[family] for family in asked}
    return Measured(name, accuracy, searched / max(total, 1), seconds)


def tally(task: Task, batch: Batch, hit: Tensor) -> Iterator[tuple[str, int, int]]:
    """(family, scored positions at a token of it, hits among them); hit: [b t]."""
    for family in task.vocabulary.families:
        here = batch.scored & of_family(batch.tokens, task.vocabulary[family])
        if bool(here.any()):
            yield family, int(here.sum()), int(hit[here].sum())


def gated(model: MemoryTransformer) -> list[ExternalMemory]:
    """The model's external memories that have a retrieval gate."""
    return [m for m in model.modules() if isinstance(m, ExternalMemory) and m.retrieval is not None]


def of_family(tokens: Tensor, family: range) -> Tensor:
    """Which tokens are of a family of the vocabulary: [b t] true."""
    return (tokens >= family.start) & (tokens < family.stop)


@contextmanager
def decided(model: MemoryTransformer, plan: Tensor | None) -> Iterator[list[Tensor]]:
    """Inside, gates search where plan [b n] says, or as they are; yields who was searched for, by layer."""
    heard: list[Tensor] = []
    memories = gated(model)

    def deciding(memory: ExternalMemory) -> Callable[[Tensor], Decision]:
        own = memory.decide

        def decide(hidden: Tensor) -> Decision:
            decision = own(hidden)
            assert decision is not None
            if plan is not None:
                decision = Decision(decision.gate, plan, decision.gate * plan)
            heard.append(decision.search)
            return decision

        return decide

    for memory in memories:
        memory.decide = deciding(memory)  # type: ignore[assignment, method-assign]
    try:
        yield heard
    finally:
        for memory in memories:
            del memory.decide


@contextmanager
def left_out(model: MemoryTransformer, source: int) -> Iterator[None]:
    """Inside, one source of every softmax fusion has weight zero: 0 attention, 1 … the memories."""
    fusions = [m for m in model.modules() if isinstance(m, SoftmaxFusion)]
    before = [fusion.gate.bias.detach().clone() for fusion in fusions]
    try:
        for fusion in fusions:
            fusion.gate.bias.data[source] = -torch.inf
        yield
    finally:
        for fusion, bias in zip(fusions, before, strict=True):
            fusion.gate.bias.data.copy_(bias)


def hybrid_table(rows: list[Measured]) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people; time as a multiple of that with a search for every token."""
    always = next(row.cpu_seconds for row in rows if row.name == "always")
    families = list(rows[0].accuracy)
    head = ["", *(f"{family} recalled" for family in families), "tokens searched for", "CPU time"]
    return head, [
        [
            row.name,
            *(f"{row.accuracy[f]:.3f}" for f in families),
            f"{row.searched:.2f}",
            f"{row.cpu_seconds / always:.2f}",
        ]
        for row in rows
    ]
