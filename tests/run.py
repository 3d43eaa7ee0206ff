"""Run every test and every notebook: `make test`. Arguments are pytest's.

Two calls of pytest, each in parallel: first the tests that compare timings, beside nothing but one another
(they measure processor time, in turns), then the rest. The last line counts both calls.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTHING = pytest.ExitCode.NO_TESTS_COLLECTED
# A file stays on one worker: its tests share fixtures and models, and a notebook's cells a kernel.
# conftest.py says how many workers there are and which files start first.
PARALLEL = ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600"]
TIMINGS = [*PARALLEL, "tests/benchmarks"]
# The notebook on pretrained models needs `make extras`; in CI it must be there.
LACKING = [] if find_spec("transformers") or os.environ.get("CI") else ["--ignore-glob=notebooks/10_*"]
# The notebook on kernels needs Triton, which is published for Linux only.
LACKING += [] if find_spec("triton") or sys.platform == "linux" else ["--ignore-glob=notebooks/11_*"]
REST = [*PARALLEL, *NBVAL, "--ignore=tests/benchmarks", *LACKING, "tests", "notebooks"]


class Count:
    """Tests by outcome. A test whose setup or teardown fails counts as failed."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    def pytest_terminal_summary(self, terminalreporter) -> None:
        stats = terminalreporter.stats
        self.passed += sum(len(stats.get(outcome, [])) for outcome in ("passed", "xpassed"))
        self.failed += sum(len(stats.get(outcome, [])) for outcome in ("failed", "error"))
        self.skipped += sum(len(stats.get(outcome, [])) for outcome in ("skipped", "xfailed"))

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.passed} passed, {self.failed} failed{skipped}"


def worst(codes: list[int]) -> int:
    """The first failing exit code. A call that selected no test fails only if no call selected one."""
    return next((code for code in codes if code not in (0, NOTHING)), min(codes))


def main(arguments: list[str]) -> int:
    count, codes = Count(), []
    for selected in (TIMINGS, REST):
        codes.append(int(pytest.main([*selected, *arguments], plugins=[count])))
        if codes[-1] in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.USAGE_ERROR):
            break
    print(count)
    return worst(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
