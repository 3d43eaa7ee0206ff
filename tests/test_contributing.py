"""CONTRIBUTING.md keeps its word: its code is the example's own, its commands and paths exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "tests" / "memory" / "delta.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=lambda b: b.split()[1]
)
def test_its_code_is_that_of_the_example(block):
    assert block in EXAMPLE


def test_its_paths_and_make_targets_exist():
    for path in re.findall(r"`((?:memlib|tests|docs)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for targets in re.findall(r"^(?:\| `)?make ([a-z -]+)", PAGE, re.MULTILINE):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_its_selections_select_something():
    for _, expression in re.findall(r"pytest (\S+) -k \"(.*?)\"", PAGE):
        assert "ltm" in expression
    names = (ROOT / "tests" / "laws" / "laws.py").read_text(encoding="utf-8")
    assert '"L1_causality"' in names
