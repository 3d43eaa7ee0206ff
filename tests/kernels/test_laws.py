"""The laws of memories through the kernels: one layer of each memory in float32, interpreted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from memlib.memory import MEMORIES
from memlib_kernels.interpreter import interpreted

from ..laws.cases import Case, in_float32, variants
from ..laws.laws import LAWS, PIECES, off, padding

CASES = [in_float32(Case(kind, {}, {kind: variants(kind)[0]}, layers=1)) for kind in MEMORIES]
LAWS_HERE = ("L1_causality", "L3_isolation", "L4_segmentation")


@cache
def model(case: Case):
    return case.build()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_laws_hold_through_the_kernels(case: Case):
    with interpreted() as record:
        for law in LAWS_HERE:
            LAWS[law](lambda: model(case), PIECES)
    assert record.launches


@pytest.mark.slow
def test_off_is_the_plain_transformer_through_the_kernels():
    case = next(c for c in CASES if "internal" in c.kinds)
    plain = replace(case, name="baseline", memory={}, kinds={})
    with interpreted() as record:
        off(case.fresh(vanilla_mode=True), plain.build(), PIECES)
        padding(lambda: model(case))
    assert record.launches
