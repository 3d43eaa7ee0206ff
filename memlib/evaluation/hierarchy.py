"""Evaluation of a hierarchy of states: reads from one bank only, and recall in a long stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memlib.memory.hds import HdsMemory
from memlib.models.eval_mode import eval_mode
from memlib.models.transformer import MemoryTransformer
from memlib.tasks import Task
from memlib.tasks.scoring import correct


@contextmanager
def read_alone(memory: HdsMemory, bank: int) -> Iterator[None]:
    """Temporarily restrict reads of level 3 to one bank.

    Raises IndexError if the bank does not exist.
    """
    gate = memory.banks.read_gate
    kept = [p.detach().clone() for p in (gate.weight, gate.bias)]
    if not 0 <= bank < len(gate.bias):
        raise IndexError(f"bank {bank}: choose one of 0 to {len(gate.bias) - 1}")
    try:
        with torch.no_grad():
            gate.weight.zero_()
            gate.bias.fill_(-1e4)
            gate.bias[bank] = 0.0
        yield
    finally:
        with torch.no_grad():
            gate.weight.copy_(kept[0])
            gate.bias.copy_(kept[1])


@torch.no_grad()
def recall_in_stream(model: MemoryTransformer, task: Task, episodes: int, rows: int = 256) -> list[float]:
    """Accuracy on each of several consecutive examples of one stream, without a reset in between.

    Every example has its own facts, so content of earlier examples interferes. rows: streams in parallel.
    """
    state, accuracy = None, []
    device = next(model.parameters()).device
    with eval_mode(model):
        for episode in range(episodes):
            batch = task.batch(rows, episode, 0, split="test").to(device)
            output = model(batch.tokens, memory_state=state)
            state = output.memory_state
            right = correct(output.logits, batch.targets, batch.scored)
            accuracy.append(right / int(batch.scored.sum()))
    return accuracy
