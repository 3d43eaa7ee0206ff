"""Hook points are the protocol between memories and views, and cost nothing while nobody listens."""

import re
from pathlib import Path

import pytest
import torch

from memlib.lab.trace import record
from memlib.memory import MEMORIES
from memlib.nn.hook_point import HookPoint
from tests.laws.cases import BATCH, SEGMENT, VOCAB, cases

PAGE = (Path(__file__).parents[2] / "docs" / "widgets.md").read_text(encoding="utf-8")
VARIANTS = [case for case in cases() if case.name.endswith("per_layer")]


def run(model):
    return model(torch.randint(VOCAB, (BATCH, 2 * SEGMENT), generator=torch.Generator().manual_seed(0)))


def refuses():
    raise AssertionError("computed for a recording that nobody makes")


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_nothing_is_computed_while_nobody_listens(case, monkeypatch):
    """Every function that a point is given is replaced by one that fails."""
    forward, given = HookPoint.forward, []

    def watched(point, value):
        given.append(value)
        return forward(point, value if isinstance(value, torch.Tensor) else refuses)

    monkeypatch.setattr(HookPoint, "forward", watched)
    run(case.build())
    assert given


@pytest.mark.parametrize("case", VARIANTS, ids=str)
@torch.no_grad()
def test_recording_changes_no_result(case):
    """A recording may not send a model along another path."""
    plain = run(case.build())
    model = case.build()
    with record(model):
        recorded = run(model)
    assert torch.equal(plain.logits, recorded.logits)


def test_the_page_names_points_that_exist_with_their_axes():
    """docs/widgets.md: each point in its tables is recorded by a memory, under the axes it names."""
    known = {}
    for case in VARIANTS:
        for module in case.build().modules():
            if isinstance(module, HookPoint):
                known.setdefault(module.name, set()).add(" ".join(module.axes))
    rows = re.findall(r"^\| .*? \| (`.*?) \| (batch .*?) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 10
    for points, _ in rows:
        for point in re.findall(r"`([\w.]+)`", points):
            if point.isupper():
                continue
            names = [point.replace("MEMORY", kind) for kind in MEMORIES]
            names += [f"{kind}.{point}" for kind in MEMORIES]
            assert known.keys() & {point, *names}, point


def test_every_point_of_a_model_has_a_name_of_its_own():
    for case in VARIANTS:
        block = case.build().block(0)
        names = [module.name for module in block.modules() if isinstance(module, HookPoint)]
        assert len(names) == len(set(names)), case.name
