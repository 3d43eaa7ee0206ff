"""A memory joins the laws by registration alone: its file, its dataclass and field, its line.

`toys.py` is the file. What a person would add to the package's own files is patched in here.
"""

from dataclasses import dataclass

import pytest

from memlib.config import option
from memlib.memory import MEMORIES

from .cases import cases, without_small_value
from .laws import FEEDINGS, every_law
from .toys import RingConfig, RingMemory, register


@pytest.fixture
def registered(monkeypatch):
    register(monkeypatch, toy=(RingMemory, RingConfig))


def test_a_registered_memory_is_a_case_alone_and_with_the_others(registered):
    names = {case.name for case in cases()}
    for where in ("shared", "per_layer", "every_k_layers", "residual_A", "residual_B"):
        assert {f"toy-{where}", f"all-{where}"} <= names
    alone, together = (next(c for c in cases() if c.name == n) for n in ("toy-shared", "all-per_layer"))
    assert [type(m) for m in alone.build().blocks[0].memories.values()] == [RingMemory]
    assert list(together.build().blocks[0].memories) == list(MEMORIES)


@pytest.mark.parametrize("name", ["toy-per_layer", "toy-residual_B", "all-shared"])
def test_the_laws_hold_for_it(registered, name):
    (case,) = (case for case in cases() if case.name == name)
    every_law(case, FEEDINGS[2:4])


@dataclass(kw_only=True)
class Sizeless(RingConfig):
    """A size that tests would take as it is."""

    places: int = option(4096, "places", 1)
    rows: int | None = option(None, "rows", 1)
    wide: bool = option(True, "not a size")


def test_a_size_without_a_small_value_is_caught(monkeypatch):
    register(monkeypatch, toy=(RingMemory, Sizeless))
    assert without_small_value("toy") == ["places", "rows"]
