"""A recorded kernel launch as plain arrays: which elements each program loads and stores, in order.

Axes: t accesses in order, g grids, p programs.

A tensor is shown as a grid of its memory, with a given number of elements in a row. With `pairs=("Q", "K")`
there is one more grid, which no kernel stores: the pairs of a row of Q and a row of K that a program held at
the same time. They are the scores that were computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from memlib_kernels.interpreter import Access, Record
    from memlib_kernels.launch import Grid


@dataclass(frozen=True)
class Launch:
    """One launch. The elements of all grids are numbered through: those of grid g begin at first[g].

    kernel: its name; names, rows, columns: of each grid [g]; itemsize: bytes of an element [g], 0 for pairs;
    programs: their places in the launch's grid [p]; program, grid, store, line, bytes: of each access [t];
    elements: access i touches elements[starts[i] : starts[i + 1]], pairs included; flops: operations of the
    products between access i and the next one [t].
    """

    kernel: str
    names: list[str]
    rows: np.ndarray
    columns: np.ndarray
    itemsize: np.ndarray
    programs: list[str]
    program: np.ndarray
    grid: np.ndarray
    store: np.ndarray
    line: np.ndarray
    bytes: np.ndarray
    starts: np.ndarray
    elements: np.ndarray
    flops: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """The first element of each grid, and the number of all elements: [g+1]."""
        return np.concatenate(([0], np.cumsum(self.rows * self.columns)))

    def touched(self, access: int) -> np.ndarray:
        """The elements of an access, pairs included."""
        return self.elements[self.starts[access] : self.starts[access + 1]]

    def of_tensor(self, access: int) -> np.ndarray:
        """The elements of an access in its own tensor, counted from the tensor's first."""
        first, end = self.first[self.grid[access] :][:2]
        found = self.touched(access)
        return found[(found >= first) & (found < end)] - first

    def loaded_once(self) -> np.ndarray:
        """Bytes loaded up to each access if every element were loaded once: [t]."""
        seen, total, so_far = np.zeros(self.first[-1], dtype=bool), 0, []
        for access, grid in enumerate(self.grid):
            if not self.store[access]:
                mine = self.of_tensor(access) + self.first[grid]
                total += int(self.itemsize[grid] * (~seen[mine]).sum())
                seen[mine] = True
            so_far.append(total)
        return np.array(so_far)

    def say(self, access: int) -> str:
        """One access in words."""
        grid, where = self.grid[access], self.of_tensor(access)
        rows, columns = np.unique(where // self.columns[grid]), np.unique(where % self.columns[grid])
        what = self.names[grid]
        if self.rows[grid] == 1:
            what += f"[{span(columns)}]"
        elif len(columns) == self.columns[grid]:
            what = f"{'row' if len(rows) == 1 else 'rows'} {span(rows)} of {what}"
        else:
            what += f"[{span(rows)}, {span(columns)}]"
        verb = "stores" if self.store[access] else "loads"
        program = self.programs[self.program[access]]
        return f"program {program} {verb} {what} ({self.bytes[access]:,} bytes)"


def span(numbers: np.ndarray) -> str:
    """Sorted numbers in short: 16–31, or the first ones of a scattered set."""
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{numbers[0]}–{numbers[-1]}"
    few = ", ".join(str(number) for number in numbers[:4])
    return few if len(numbers) <= 4 else f"{few}, … {numbers[-1]}"


def launch_of(
    record: Record, columns: Mapping[str, int], launch: int = 0, pairs: tuple[str, str] | None = None
) -> Launch:
    """A launch of `with interpreted(record=True) as record`.

    columns: the tensors to show, and each one's elements in a row; pairs: two of them. Raises ValueError for
    a tensor that the launch does not touch, such as any tensor where nothing was recorded.
    """
    ours = [(i, a) for i, a in enumerate(record.accesses) if a.launch == launch]
    used = sorted({a.tensor for _, a in ours})
    lacking = [name for name in [*columns, *(pairs or ())] if name not in used or name not in columns]
    if lacking:
        raise ValueError(
            f"launch {launch} of {len(record.launches)} does not touch {', '.join(lacking)}; it touches "
            f"{', '.join(used) or 'nothing: launch in `with interpreted(record=True)`'}"
        )
    places = [i for i, a in ours if a.tensor in columns]
    kept = [a for _, a in ours if a.tensor in columns]
    names, wide = list(columns), list(columns.values())
    ends = {name: record.sizes[launch, name] for name in names}
    for access in kept:  # a view of a larger tensor may end behind its own number of elements
        ends[access.tensor] = max(ends[access.tensor], 1 + int(access.offsets[access.mask].max()))
    high = [-(-ends[name] // columns[name]) for name in names]
    if pairs is not None:
        names.append(f"{pairs[0]} × {pairs[1]}")
        high, wide = [*high, high[names.index(pairs[0])]], [*wide, high[names.index(pairs[1])]]
    first = np.concatenate(([0], np.cumsum(np.multiply(high, wide))))
    elements = [np.unique(a.offsets[a.mask]) + first[names.index(a.tensor)] for a in kept]
    if pairs is not None:
        for i, met in meetings(kept, columns, pairs, wide[-1]):
            elements[i] = np.concatenate((elements[i], first[-2] + met))
    sizes = {a.tensor: a.itemsize for a in kept}
    kernel, grid = record.launches[launch]
    order = list(dict.fromkeys(a.program for a in kept))
    return Launch(
        kernel=kernel,
        names=names,
        rows=np.array(high),
        columns=np.array(wide),
        itemsize=np.array([sizes.get(name, 0) for name in names]),
        programs=[name_of(program, grid) for program in order],
        program=np.array([order.index(a.program) for a in kept]),
        grid=np.array([names.index(a.tensor) for a in kept]),
        store=np.array([a.kind == "store" for a in kept]),
        line=np.array([a.line for a in kept]),
        bytes=np.array([a.bytes for a in kept]),
        starts=np.cumsum([0, *(len(e) for e in elements)]),
        elements=np.concatenate(elements),
        flops=flops_after(record, places, launch),
    )


def meetings(
    accesses: Sequence[Access], columns: Mapping[str, int], pairs: tuple[str, str], wide: int
) -> Iterable[tuple[int, np.ndarray]]:
    """For each load that completes pairs, its place and the pairs, numbered through in rows of `wide`.

    What a program holds of a tensor is what it loaded last.
    """
    held: dict[tuple[Grid, str], np.ndarray] = {}
    for i, access in enumerate(accesses):
        if access.kind == "load" and access.tensor in pairs:
            rows = np.unique(access.offsets[access.mask] // columns[access.tensor])
            held[access.program, access.tensor] = rows
            if all((access.program, name) in held for name in pairs):
                left, right = (held[access.program, name] for name in pairs)
                yield i, np.add.outer(left * wide, right).ravel()


def flops_after(record: Record, places: Sequence[int], launch: int) -> np.ndarray:
    """Operations of the products between each access and the next; places: the accesses' in the record."""
    flops = np.zeros(len(places), dtype=int)
    for product in record.products:
        if product.launch == launch:
            flops[max(0, int(np.searchsorted(places, product.accesses)) - 1)] += product.flops
    return flops


def name_of(program: Grid, grid: Grid) -> str:
    """A program's place in the launch's grid, without the last axes if they have one place."""
    axes = max((i + 1 for i, size in enumerate(grid) if size > 1), default=1)
    return str(program[0]) if axes == 1 else f"({', '.join(str(i) for i in program[:axes])})"
