"""Start a module of the tests by itself: it forks the processes of a run, which pytest's process must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run_module(name: str, *arguments: object, timeout: int) -> str:
    """What `python -m tests.training.parallel.NAME ARGUMENTS` prints; AssertionError if it fails."""
    command = [sys.executable, "-m", f"tests.training.parallel.{name}", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
