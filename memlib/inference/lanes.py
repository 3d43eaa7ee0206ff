"""Reading rows of different lengths, each exactly as it would be read alone.

The rows of a forward pass share one segment grid, and padding takes places in it: a row that is padded
on the left has its segment borders elsewhere than alone, and its memories are written with other tokens
together. So nothing is padded here. Rows whose open windows are equally long stand at the same place of
their segments and form a lane. Lanes read side by side, a segment's rest at a time; a row that has less
to read than the others of its lane leaves it, and lanes that come to stand at the same place become one.

The price: rows at different places of their segments take a forward pass each, at most one for every
place there is (`segment_length`), and usually as many as there are different prompt lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memlib.models import MemoryState, MemoryTransformer


@dataclass(frozen=True)
class Lane:
    """Rows by their numbers, all at the same place of their segments, and their state in that order."""

    rows: tuple[int, ...]
    state: MemoryState

    @property
    def place(self) -> int:
        """Tokens in the open windows."""
        return self.state.window.length

    def pick(self, rows: Iterable[int]) -> Lane:
        """The lane of some of its rows."""
        picked = tuple(rows)
        if picked == self.rows:
            return self
        index = torch.tensor([self.rows.index(row) for row in picked], device=self.state.window.mask.device)
        return Lane(picked, self.state.rows(index))


def lanes_of(states: Sequence[MemoryState]) -> list[Lane]:
    """Lanes of rows 0, 1, …, whose states are given one by one."""
    return merged([Lane((row,), state) for row, state in enumerate(states)])


def merged(lanes: Sequence[Lane]) -> list[Lane]:
    """The same rows with one lane for each place."""
    places: dict[int, list[Lane]] = {}
    for lane in lanes:
        places.setdefault(lane.place, []).append(lane)
    return [
        group[0]
        if len(group) == 1
        else Lane(
            tuple(row for lane in group for row in lane.rows),
            group[0].state.join(*(lane.state for lane in group[1:])),
        )
        for group in places.values()
    ]


def kept(lanes: Sequence[Lane], rows: Iterable[int]) -> list[Lane]:
    """The lanes with these rows only."""
    wanted = set(rows)
    return [lane.pick(row for row in lane.rows if row in wanted) for lane in lanes if wanted & {*lane.rows}]


def row_states(lanes: Sequence[Lane]) -> dict[int, MemoryState]:
    """Each row's state, a batch of one, by its number."""
    return {row: lane.pick((row,)).state for lane in lanes for row in lane.rows}


@torch.no_grad()
def read(
    model: MemoryTransformer, lanes: Sequence[Lane], tokens: Mapping[int, Sequence[int]]
) -> tuple[list[Lane], dict[int, Tensor]]:
    """Let every row read its tokens: the lanes after that, and by row the last token's logits [v].

    tokens: row -> what it reads; a row that is not named, or has nothing to read, stays as it is.
    """
    left = {row: list(ids) for row, ids in tokens.items() if len(ids)}
    logits: dict[int, Tensor] = {}
    lanes = list(lanes)
    while left:
        parts = []
        for lane in lanes:
            room = model.config.model.segment_length - lane.place
            count = {row: min(len(left.get(row, ())), room) for row in lane.rows}
            for m in sorted(set(count.values())):
                part = lane.pick(row for row in lane.rows if count[row] == m)
                parts.append(advance(model, part, left, m, logits) if m else part)
        lanes = merged(parts)
    return lanes, logits


def advance(
    model: MemoryTransformer, lane: Lane, left: dict[int, list[int]], m: int, logits: dict[int, Tensor]
) -> Lane:
    """Read m tokens of what is left for each row of a lane; notes the logits of rows that are through."""
    device = model.embedding.weight.device
    ids = torch.tensor([left[row][:m] for row in lane.rows], device=device)
    output = model(ids, memory_state=lane.state)
    for row, last in zip(lane.rows, output.logits[:, -1], strict=True):
        left[row] = left[row][m:]
        if not left[row]:
            del left[row]
            logits[row] = last
    return Lane(lane.rows, output.memory_state)
