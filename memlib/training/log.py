"""The log of a run: one JSON object per line, and the same values for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from memlib.files import write_text


class RunLog:
    """Append records to `log.jsonl` and `tensorboard/` in a run's folder.

    Opening at `step` first drops records of later steps: a run killed after its last checkpoint repeats
    those steps, and each step must appear once.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "log.jsonl"
        kept = [r for r in read_log(folder) if r["step"] <= step] if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def describe(self, start: dict[str, object]) -> None:
        """Add a start of the run to `run.json`: versions, code, machine, command."""
        path = self.path.with_name("run.json")
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        write_text(path, json.dumps([*starts, start], indent=1) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()
        self.board.close()


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """The records of a run's log; an incomplete last line is ignored."""
    records = []
    for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
