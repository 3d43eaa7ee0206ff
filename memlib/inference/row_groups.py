"""Reading rows of different lengths, each exactly as if it were alone.

The rows of a forward pass share their segment borders. Padding on the left would move a row's borders, so
its memories would be written with other groups of tokens. Therefore nothing is padded here. Rows with
equally long open windows form a group and share forward passes, each at most up to the end of the segment.
A row that has fewer tokens to read than its group leaves it; groups with equally long windows are merged.

The cost: rows with windows of different lengths need separate forward passes. There are at most
`segment_length` groups, and usually as many as there are different prompt lengths.
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
    """Row numbers with equally long open windows, and their joint state in that order."""

    rows: tuple[int, ...]
    state: MemoryState

    @property
    def window_length(self) -> int:
        """Number of tokens in the open windows."""
        return self.state.window.length

    def pick(self, rows: Iterable[int]) -> RowGroup:
        """The group restricted to some of its rows."""
        picked = tuple(rows)
        if picked == self.rows:
            return self
        index = torch.tensor([self.rows.index(row) for row in picked], device=self.state.window.mask.device)
        return RowGroup(picked, self.state.rows(index))


def row_groups(states: Sequence[MemoryState]) -> list[RowGroup]:
    """Groups of rows 0, 1, …, from one state per row."""
    return merged([RowGroup((row,), state) for row, state in enumerate(states)])


def merged(groups: Sequence[RowGroup]) -> list[RowGroup]:
    """Merge groups with equally long open windows."""
    by_shape: dict[tuple[int, ...], list[RowGroup]] = {}
    for group in groups:
        by_shape.setdefault(group.state.window.shape, []).append(group)
    return [
        same[0]
        if len(same) == 1
        else RowGroup(
            tuple(row for group in same for row in group.rows),
            same[0].state.join(*(group.state for group in same[1:])),
        )
        for same in by_shape.values()
    ]


def kept(groups: Sequence[RowGroup], rows: Iterable[int]) -> list[RowGroup]:
    """The groups restricted to these rows."""
    wanted = set(rows)
    return [
        group.pick(row for row in group.rows if row in wanted) for group in groups if wanted & {*group.rows}
    ]


def row_states(groups: Sequence[RowGroup]) -> dict[int, MemoryState]:
    """Each row's state, as a batch of one, by row number."""
    return {row: group.pick((row,)).state for group in groups for row in group.rows}


@torch.no_grad()
def read(
    model: RecurrentModel, groups: Sequence[RowGroup], tokens: Mapping[int, Sequence[int]]
) -> tuple[list[RowGroup], dict[int, Tensor]]:
    """Read tokens into every row's state; returns the new groups, and each row's last logits [v].

    tokens: row -> ids to read; the state of a row without tokens is unchanged.
    """
    left = {row: list(ids) for row, ids in tokens.items() if len(ids)}
    logits: dict[int, Tensor] = {}
    groups = list(groups)
    while left:
        parts = []
        for group in groups:
            room = model.segment_length - group.window_length
            counts = {row: min(len(left.get(row, ())), room) for row in group.rows}
            for count in sorted(set(counts.values())):
                part = group.pick(row for row in group.rows if counts[row] == count)
                parts.append(advance(model, part, left, count, logits) if count else part)
        groups = merged(parts)
    return groups, logits


def advance(
    model: RecurrentModel, group: RowGroup, left: dict[int, list[int]], count: int, logits: dict[int, Tensor]
) -> RowGroup:
    """Read the next `count` tokens of each row of a group; stores the logits of finished rows."""
    device = model.device
    ids = torch.tensor([left[row][:count] for row in group.rows], device=device)
    output = model(ids, memory_state=group.state)
    for row, last in zip(group.rows, output.logits[:, -1], strict=True):
        left[row] = left[row][count:]
        if not left[row]:
            del left[row]
            logits[row] = last
    return RowGroup(group.rows, output.memory_state)
