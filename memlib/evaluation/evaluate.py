"""Accuracy and loss of a model on a task's test split."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from memlib.models.eval_mode import eval_mode
from memlib.models.transformer import MemoryTransformer
from memlib.tasks import Task
from memlib.tasks.scoring import correct, scored_cross_entropy


@dataclass(frozen=True)
class Score:
    """accuracy: at the scored positions; loss: mean cross-entropy in nats; positions: their number; chance:
    accuracy of the best guess without memory."""

    accuracy: float
    loss: float
    positions: int
    chance: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: MemoryTransformer,
    task: Task,
    examples: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    memory: bool = True,
) -> Score:
    """Score a model on the task's test split.

    memory=False resets the state before each segment, an ablation of the memory. If the task continues,
    rows carry their memory from batch to batch, as in training.
    """
    batch_size = task.test_rows(batch_size)
    device = next(model.parameters()).device
    right = total = 0
    loss, state = 0.0, None
    with eval_mode(model):
        for step in range(-(-examples // batch_size)):
            batch = task.batch(batch_size, step, seed, split="test").to(device)
            if not task.continues:
                state = None
            elif state is not None:
                state = model.reset(state, batch.starts)
            for piece in range(0, batch.tokens.shape[1], task.segment_length):
                part = slice(piece, piece + task.segment_length)
                more = batch.borders(part, task.segment_length)
                output = model(batch.tokens[:, part], memory_state=state if memory else None, **more)
                state = output.memory_state
                where = batch.targets[:, part], batch.scored[:, part]
                right += correct(output.logits, *where)
                loss += float(scored_cross_entropy(output.logits, *where))
                total += int(batch.scored[:, part].sum())
    return Score(right / total, loss / total, total, task.chance)
