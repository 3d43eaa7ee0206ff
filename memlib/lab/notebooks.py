"""Run notebooks in place, and find their exercises: `make notebooks` and the notebooks' tests.

python -m memlib.lab.notebooks run notebooks/*.ipynb
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from memlib.lab.widgets.view import FACES

SOLUTION = re.compile(
    r"<details>\s*<summary>(?P<title>[^<]*)</summary>.*?```python\n(?P<code>.*?)```", re.DOTALL
)


def run(path: Path) -> NotebookNode:
    """Execute a notebook in a fresh kernel and store its outputs, atomically."""
    notebook = nbformat.read(path, as_version=4)
    os.environ[FACES] = "static"  # inherited by the kernel: stores pictures instead of widgets
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    scratch = path.with_suffix(".part")
    nbformat.write(notebook, scratch)
    os.replace(scratch, path)
    return notebook


@dataclass(frozen=True)
class Exercise:
    """An exercise cell with the two folded answers of the markdown cell after its check."""

    name: str
    cell: int
    solution: str
    wrong: str


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """Find the exercises of a notebook: cells tagged `exercise`, each followed by a check and its answers.

    Raises ValueError for an exercise without a check, a solution or a common wrong answer.
    """
    found = []
    for i, cell in enumerate(notebook.cells):
        if "exercise" not in cell.metadata.get("tags", []):
            continue
        check, answers = notebook.cells[i + 1], notebook.cells[i + 2]
        codes = [m["code"] for m in SOLUTION.finditer(answers.source)]
        if "check" not in check.metadata.get("tags", []) or len(codes) != 2:
            raise ValueError(
                f"cell {i}: an exercise is followed by a cell tagged check and a markdown cell with two "
                f"folded python answers (solution, common wrong answer); found {len(codes)}"
            )
        name = re.search(r'lesson\.exercise\("([^"]+)"\)', check.source)
        if name is None:
            raise ValueError(f'cell {i + 1}: a check runs inside `with lesson.exercise("name"):`')
        found.append(Exercise(name[1], i, *codes))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m memlib.lab.notebooks", description=__doc__)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("paths", nargs="+", type=Path)
    arguments = parser.parse_args(argv)
    for path in arguments.paths:
        print(f"{path} …", flush=True)
        run(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
