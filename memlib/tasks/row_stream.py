"""The rows of a data set in random order, epoch after epoch, from a position that can be saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from memlib.config import SourceConfig
from memlib.tasks.sources import open_dataset, open_stream, unreadable

Row = dict[str, Any]


class RowStream(Iterator[Row]):
    """Yield the rows of a data set; each epoch yields every row once.

    Rows are shuffled within blocks, by (seed, epoch, block). One block is the whole data set, or with
    `streaming` the next `block` rows. So a position is a few numbers, and a stream that continues from it
    yields exactly the rows that would have followed; the shuffle buffer of `datasets` cannot be saved.

    field: the configuration's path, for error messages
    epochs: passes over the data; None: no end

    Raises ValueError for a data set that is missing, cannot be read or is empty.
    """

    def __init__(self, config: SourceConfig, field: str, seed: int = 0, epochs: int | None = None) -> None:
        self.config, self.field, self.seed, self.epochs = config, field, seed, epochs
        opened = open_stream(config, field) if config.streaming else open_dataset(config, field)
        self.data: Any = opened if config.streaming else ConcatDataset(opened)
        self._open_epoch(0)
        if not self.rows:
            raise ValueError(f"{field}.dataset = {config.dataset!r}: holds no rows; choose another")

    def __next__(self) -> Row:
        while self.epoch != self.epochs and self.position == len(self.order):
            self._open_block(self.block + 1, self.data.state_dict() if self.config.streaming else None)
            if not self.rows:
                self._open_epoch(self.epoch + 1)
        if self.epoch == self.epochs:
            raise StopIteration
        self.position += 1
        return self.rows[int(self.order[self.position - 1])]

    def state_dict(self) -> dict[str, Any]:
        """The position, as values that JSON can hold."""
        return {
            "seed": self.seed,
            "streaming": self.config.streaming,
            "block_size": len(self.data) if not self.config.streaming else self.config.block,
            "epoch": self.epoch,
            "block": self.block,
            "position": self.position,
            "source": self.source,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; raises ValueError if it belongs to other data or another order."""
        mine = self.state_dict()
        check_same(state, {name: mine[name] for name in ("seed", "streaming", "block_size")}, self.field)
        self._open_epoch(state["epoch"], state["block"], state["source"])
        self.position = state["position"]

    def _open_epoch(self, epoch: int, block: int = 0, source: dict[str, Any] | None = None) -> None:
        """Open a block of an epoch; source: where it begins in a stream, None at the epoch's beginning."""
        self.epoch = epoch
        if self.config.streaming:
            self.data.load_state_dict(source)
            self.reader = iter(self.data)
        self._open_block(block, source)

    def _open_block(self, block: int, source: dict[str, Any] | None = None) -> None:
        """Read a block of the epoch, the next one of a stream, and draw its order."""
        self.block, self.position, self.source = block, 0, source
        self.rows: Sequence[Row]
        if self.config.streaming:
            self.rows = self._next_rows()
        else:
            self.rows = self.data if block == 0 else ()
        self.order = np.random.default_rng([self.seed, self.epoch, block]).permutation(len(self.rows))

    def _next_rows(self) -> list[Row]:
        from datasets.exceptions import DatasetsError

        try:
            return list(islice(self.reader, self.config.block))
        except (OSError, ValueError, DatasetsError) as error:
            raise unreadable(self.config.dataset, self.field, error) from error


def check_same(state: dict[str, Any], mine: dict[str, Any], field: str) -> None:
    """Raise ValueError if a saved position was made with other settings or other data."""
    for name, value in mine.items():
        if state.get(name) != value:
            raise ValueError(
                f"{field}: the saved position has {name} = {state.get(name)!r}, not {value!r}; continue with "
                "the settings and the data that it was saved with"
            )
