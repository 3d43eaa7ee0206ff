"""The laws, on pretrained models with memories: every registered memory, through the same functions.

In the mode `full` the base attends to all it has seen and its cache grows: L6 does not hold.
"""

from copy import deepcopy
from functools import cache
from itertools import cycle

import pytest

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

from memlib.memory import MEMORIES
from memlib.pretrained.adapter import Pass

from ..laws.cases import SEGMENT, carries, memory_config, variants
from ..laws.laws import FEEDINGS, LAWS, MANY, endless, feed, off, padding, separate_models, stream, truncation
from .bases import FAMILIES, AdapterCase

FULL = (("mode", "full"),)
SEGMENTS = (("mode", "segment"),)


def cases() -> list[AdapterCase]:
    """Each memory in each variant that can be fused, in both modes; shared states; all memories at once."""
    found = []
    for kind in MEMORIES:
        fused = [options for options in variants(kind) if not memory_config(kind)(**options).in_attention]
        for options in fused:
            family = FAMILIES[len(found) % len(FAMILIES)]
            chosen = "-".join([kind, *(v for v in options.values() if isinstance(v, str))])
            found.append(AdapterCase(f"{chosen}-full", {}, {kind: options}, family=family, adapter=FULL))
        first = {kind: fused[0]}
        found.append(AdapterCase(f"{kind}-segment", {}, first, family=family, adapter=SEGMENTS))
        found.append(AdapterCase(f"{kind}-shared", {"memory_sharing": "shared"}, first, adapter=SEGMENTS))
    together = {kind: variants(kind)[0] for kind in MEMORIES}
    last = {"memory_layer_placement": "last_k", "memory_layer_k": 1}
    return [*found, AdapterCase("all-full", last, together, adapter=FULL)]


CASES = cases()


def every(name, values):
    return pytest.mark.parametrize(name, values, ids=str)


@cache
def make(case: AdapterCase):
    return cycle((case.build(), case.build())).__next__


@every("feeding", FEEDINGS)
@every("case", CASES)
def test_every_law_holds(case, feeding):
    for name, law in LAWS.items():
        if name != "L6_bounded" or "full" not in case.name:
            law(make(case), feeding)


@every("case", CASES)
def test_padding_detach_and_two_adapters(case):
    padding(make(case))
    separate_models(make(case))
    if carries(case.config()):
        truncation(make(case))


@every("case", CASES)
def test_off_is_the_base_bit_for_bit(case):
    base = AdapterCase("base", {}, {}, family=case.family, adapter=case.adapter).fresh()
    off(case.fresh(), base, MANY)
    closed = deepcopy(make(case)())
    closed.close_memory()
    off(closed, base, MANY)


@every("case", [case for case in CASES if "full" not in case.name])
def test_a_long_stream_stays_finite(case):
    endless(make(case))


@every("case", CASES)
def test_what_was_said_before_is_read(case):
    """In the mode `segment` only the memories reach an earlier segment; with `full` the base does too."""
    model, tokens = make(case)(), stream(MANY)
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 17
    (before, _), (after, _) = feed(model, tokens), feed(model, changed)
    effect = float((after - before)[:, -SEGMENT:].abs().max())
    reaches = carries(case.config()) or "full" in case.name
    assert effect > 1e-6 if reaches else effect == 0


def test_positions_that_count_padding_break_the_law(monkeypatch):
    """transformers takes rotary angles in float32: a token at another place differs, also in float64."""
    case = next(case for case in CASES if "external" in case.name and "full" in case.name)
    padding(cache(case.build))
    monkeypatch.setattr(Pass, "positions", None)
    with pytest.raises(AssertionError, match="differs by"):
        padding(cache(case.build))
