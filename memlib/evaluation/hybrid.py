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
    """accuracy: by family of the queried token; searched: fraction of tokens that triggered a search;
    cpu_seconds: of the whole pass, comparable only with other rows of the same table."""

    name: str
    accuracy: dict[str, float]
    searched: float
    cpu_seconds: float


def measure_hybrid(model: MemoryTransformer, task: Task, family: str, examples: int = 256) -> list[Measured]:
    """Measure the full model, the model without each part, and other search decisions.

    family: the family of the task's vocabulary that needs retrieval; the oracle gate searches for it.

    | row                    | what is measured                                                 |
    | learned                | the model as trained                                             |
    | without internal, …    | one source masked in the fusion softmax                          |
    | always, never          | every token triggers a search; no token does                     |
    | oracle                 | only tokens of the family trigger a search                       |
    | random                 | control: random tokens, as many as the learned gate selects      |

    Raises ValueError for a model without a retrieval gate.
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
    generator = torch.Generator().manual_seed(0)
    plans: dict[str, Plan] = {
        "always": lambda batch: torch.ones_like(batch.scored),
        "oracle": lambda batch: of_family(batch.tokens, needed),
        "random": lambda batch: torch.rand(batch.scored.shape, generator=generator) < learned.searched,
        "never": lambda batch: torch.zeros_like(batch.scored),
    }
    return rows + [measure(model, task, name, examples, plan) for name, plan in plans.items()]


def measure(
    model: MemoryTransformer, task: Task, name: str, examples: int = 256, plan: Plan | None = None
) -> Measured:
    """Measure one row; plan: which tokens trigger a search, [b t], in place of the gates' decision."""
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
                search = None if planned is None else planned[:, part]
                with decided(model, search) as decisions:
                    before = time.process_time()
                    output = model(batch.tokens[:, part], memory_state=state)
                    seconds += time.process_time() - before
                state = output.memory_state
                hits.append(output.logits.argmax(-1) == batch.targets[:, part])
                searched += sum(int(made.sum()) for made in decisions)
                total += sum(made.numel() for made in decisions)
            for family, count, good in tally(task, batch, torch.cat(hits, 1)):
                asked[family] = asked.get(family, 0) + count
                right[family] = right.get(family, 0) + good
    accuracy = {family: right[family] / asked[family] for family in asked}
    return Measured(name, accuracy, searched / max(total, 1), seconds)


def tally(task: Task, batch: Batch, hit: Tensor) -> Iterator[tuple[str, int, int]]:
    """Yield (family, scored positions at its tokens, correct ones among them); hit: [b t]."""
    for family in task.vocabulary.families:
        here = batch.scored & of_family(batch.tokens, task.vocabulary[family])
        if bool(here.any()):
            yield family, int(here.sum()), int(hit[here].sum())


def gated(model: MemoryTransformer) -> list[ExternalMemory]:
    """The model's external memories that have a retrieval gate."""
    return [m for m in model.modules() if isinstance(m, ExternalMemory) and m.retrieval is not None]


def of_family(tokens: Tensor, family: range) -> Tensor:
    """Which tokens belong to a family of the vocabulary: [b t]."""
    return (tokens >= family.start) & (tokens < family.stop)


@contextmanager
def decided(model: MemoryTransformer, plan: Tensor | None) -> Iterator[list[Tensor]]:
    """Temporarily replace the gates' decisions by plan [b n] (None: keep them); yields them by layer."""
    decisions: list[Tensor] = []
    memories = gated(model)

    def deciding(memory: ExternalMemory) -> Callable[[Tensor], Decision]:
        own = memory.decide

        def decide(hidden: Tensor) -> Decision:
            decision = own(hidden)
            assert decision is not None
            if plan is not None:
                decision = Decision(decision.gate, plan, decision.gate * plan)
            decisions.append(decision.search)
            return decision

        return decide

    for memory in memories:
        memory.decide = deciding(memory)  # type: ignore[assignment, method-assign]
    try:
        yield decisions
    finally:
        for memory in memories:
            del memory.decide


@contextmanager
def left_out(model: MemoryTransformer, source: int) -> Iterator[None]:
    """Temporarily mask one source of every softmax fusion: 0 attention, 1 … the memories."""
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
    """Header and rows of a table; CPU time is relative to the row that always searches."""
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
