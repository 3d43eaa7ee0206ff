"""Reading rows of different lengths, each exactly as it would be read alone.

The rows of a forward pass share one segment grid, and padding takes places in it: a row that is padded
on the left has its segment borders elsewhere than alone, and its memories are written with other tokens
together. So nothing is padded here. Rows whose open windows are equally long stand at the same place of
their segments and form a group. Lanes read side by side, a segment's rest at a time; a row that has less
to read than the others of its group leaves it, and groups that come to stand at the same place become one.

The price: rows at different places of their segments take a forward pass each, at most one for every
place there is (`segment_length`), and usually as many as there are different prompt lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memlib.models import MemoryState
from memlib.models.protocol import RecurrentModel


@dataclass(frozen=True)
class RowGroup:
    """Rows by their numbers, all at the same place of their segments, and their state in that order."""

    rows: tuple[int, ...]
    state: MemoryState

    @property
    def place(self) -> int:
        """Tokens in the open windows."""
        return self.state.window.length

    def pick(self, rows: Iterable[int]) -> RowGroup:
        """The group of some of its rows."""
        picked = tuple(rows)
        if picked == self.rows:
            return self
        index = torch.tensor([self.rows.index(row) for row in picked], device=self.state.window.mask.device)
        return RowGroup(picked, self.state.rows(index))


def row_groups(states: Sequence[MemoryState]) -> list[RowGroup]:
    """Lanes of rows 0, 1, …, whose states are given one by one."""
    return merged([RowGroup((row,), state) for row, state in enumerate(states)])


def merged(groups: Sequence[RowGroup]) -> list[RowGroup]:
    """The same rows with one group for each place."""
    places: dict[int, list[RowGroup]] = {}
    for group in groups:
        places.setdefault(group.place, []).append(group)
    return [
        group[0]
        if len(group) == 1
        else RowGroup(
            tuple(row for group in group for row in group.rows),
            group[0].state.join(*(group.state for group in group[1:])),
        )
        for group in places.values()
    ]


def kept(groups: Sequence[RowGroup], rows: Iterable[int]) -> list[RowGroup]:
    """The groups with these rows only."""
    wanted = set(rows)
    return [
        group.pick(row for row in group.rows if row in wanted) for group in groups if wanted & {*group.rows}
    ]


def row_states(groups: Sequence[RowGroup]) -> dict[int, MemoryState]:
    """Each row's state, a batch of one, by its number."""
    return {row: group.pick((row,)).state for group in groups for row in group.rows}


@torch.no_grad()
def read(
    model: RecurrentModel, groups: Sequence[RowGroup], tokens: Mapping[int, Sequence[int]]
) -> tuple[list[RowGroup], dict[int, Tensor]]:
    """Let every row read its tokens: the groups after that, and by row the last token's logits [v].

    tokens: row -> what it reads; a row that is not named, or has nothing to read, stays as it is.
    """
    left = {row: list(ids) for row, ids in tokens.items() if len(ids)}
    logits: dict[int, Tensor] = {}
    groups = list(groups)
    while left:
        parts = []
        for group in groups:
            room = model.segment_length - group.place
            count = {row: min(len(left.get(row, ())), room) for row in group.rows}
            for m in sorted(set(count.values())):
                part = group.pick(row for row in group.rows if count[row] == m)
                parts.append(advance(model, part, left, m, logits) if m else part)
        groups = merged(parts)
    return groups, logits


def advance(
    model: RecurrentModel, group: RowGroup, left: dict[int, list[int]], m: int, logits: dict[int, Tensor]
) -> RowGroup:
    """Read m tokens of what is left for each row of a group; notes the logits of rows that are through."""
    device = model.device
    ids = torch.tensor([left[row][:m] for row in group.rows], device=device)
    output = model(ids, memory_state=group.state)
    for row, last in zip(group.rows, output.logits[:, -1], strict=True):
        left[row] = left[row][m:]
        if not left[row]:
            del left[row]
            logits[row] = last
    return RowGroup(group.rows, output.memory_state)
