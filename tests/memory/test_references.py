"""Every registered memory against its reference, in use and in training: values, states and gradients."""

from __future__ import annotations

from typing import Any

import pytest

from memlib.memory import MEMORIES
from tests.laws.cases import small_options, variants

from .references import REFERENCES
from .references.compare import agree, build, reference_of


def all_variants(kind: str) -> list[dict[str, Any]]:
    """The variants the laws know, and those that the reference names."""
    more = [small_options(kind) | options for options in reference_of(kind).variants]
    return [*variants(kind), *more]


def name_of(kind: str, options: dict[str, Any]) -> str:
    """What is not as in the first variant."""
    first = variants(kind)[0]
    return "-".join([kind, *(f"{k}={v}" for k, v in options.items() if first.get(k) != v)])


CASES = [(kind, options) for kind in MEMORIES if kind in REFERENCES for options in all_variants(kind)]
cases = pytest.mark.parametrize(("kind", "options"), CASES, ids=[name_of(*case) for case in CASES])


@pytest.mark.parametrize("kind", MEMORIES)
def test_every_registered_memory_has_a_reference(kind):
    reference_of(kind)


@pytest.mark.parametrize("training", [False, True], ids=["in_use", "in_training"])
@cases
def test_a_memory_is_its_reference(kind, options, training):
    agree(*build(kind, options, training))


def test_a_memory_without_a_reference_is_told_where_to_add_one(monkeypatch):
    monkeypatch.setitem(MEMORIES, "toy", MEMORIES["internal"])
    with pytest.raises(AssertionError, match=r"'toy' has no reference: .*tests/memory/references/toy.py"):
        reference_of("toy")
