"""A memory joins the laws by registration alone: its file, its dataclass and field, its line.

`toys.py` is the file. What a person would add to the package's own files is patched in here.
"""

from dataclasses import make_dataclass

import pytest

from memlib import config as configuration
from memlib.config import config as whole
from memlib.memory import MEMORIES

from .cases import BASELINE, cases
from .laws import FEEDINGS, LAWS, MANY, endless, off, padding, truncation
from .toys import RingConfig, RingMemory


@pytest.fixture
def registered(monkeypatch):
    field = ("toy", RingConfig, configuration.option(RingConfig, "the newest tokens"))
    extended = make_dataclass("MemoryConfig", [field], bases=(configuration.MemoryConfig,), kw_only=True)
    for module in (configuration, whole):
        monkeypatch.setattr(module, "MemoryConfig", extended)
    monkeypatch.setitem(MEMORIES, "toy", RingMemory)


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
    for feeding in FEEDINGS[2:4]:
        for law in LAWS.values():
            law(case.build, feeding)
    padding(case.build)
    truncation(case.build)
    endless(case.build)
    model = case.build()
    model.close_memory()
    off(model, BASELINE.fresh(), MANY)
