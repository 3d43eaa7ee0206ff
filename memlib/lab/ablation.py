"""Ablation of slots: the model's output when some slots are reset to their initial content.

Axes: g sets of slots, s slots, n tokens, q questions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from memlib.models.protocol import RecurrentModel


@dataclass(frozen=True)
class Question:
    """A query: its position, and the id of the correct next token."""

    token: int
    answer: int


def ask_without(
    model: RecurrentModel, tokens: Tensor, question: int, sets: Sequence[Sequence[int]], layer: int = 0
) -> np.ndarray:
    """The model's distribution after token `question`, for each set of ablated slots: [g v].

    tokens: [n], one stream. The slots of a set are reset to their initial content before the question's
    segment, in the `layer`-th state. Nothing else changes. Raises ValueError for a memory without slots.
    """
    import torch
    from einops import rearrange, repeat

    from memlib.memory.internal import SlotState

    length = model.segment_length
    border = question // length * length
    with torch.no_grad():
        state = model(tokens[None, :border]).memory_state if border else model.init_state(1)
        state = state.rows(torch.zeros(len(sets), dtype=torch.long))
        memories = list(state.memories)
        memory, fresh = memories[layer], model.init_state(len(sets)).memories[layer]
        if not (isinstance(memory, SlotState) and isinstance(fresh, SlotState)):
            raise ValueError(f"memory {layer} is a {type(memory).__name__}, which has no slots to ablate")
        ablated = torch.zeros(fresh.slots.shape[:2], dtype=torch.bool)
        for row, chosen in enumerate(sets):
            ablated[row, list(chosen)] = True
        memories[layer] = SlotState(
            torch.where(rearrange(ablated, "g s -> g s 1"), fresh.slots, memory.slots)
        )
        part = repeat(tokens[border : question + 1], "n -> g n", g=len(sets))
        logits = model(part, memory_state=replace(state, memories=tuple(memories))).logits[:, -1]
    return torch.softmax(logits, -1).numpy()


@dataclass(frozen=True)
class Ablation:
    """The model's distributions at each question, with and without slots.

    before: [q v], with all slots; alone: [s q v], without one slot; together: [s q v], without every slot
    that has the same main writer.
    """

    slots: list[int]
    questions: list[Question]
    before: np.ndarray
    alone: np.ndarray
    together: np.ndarray


def ablate(
    model: RecurrentModel,
    tokens: Tensor,
    questions: Sequence[Question],
    writer: np.ndarray,
    slots: Sequence[int],
    layer: int = 0,
) -> Ablation:
    """Ablate each of `slots`, alone and with all slots of the same writer; writer: [s] main writers."""
    singles = [[slot] for slot in slots]
    groups = [[s for s in slots if writer[s] == writer[slot]] for slot in slots]
    if not questions:
        raise ValueError("no questions: name at least one position whose next token is asked for")
    answers = [ask_without(model, tokens, q.token, [[], *singles, *groups], layer) for q in questions]
    every = np.stack(answers, 1).astype(np.float32)  # [1 + 2s, q, v]
    count = len(slots)
    return Ablation(list(slots), list(questions), every[0], every[1 : 1 + count], every[1 + count :])
