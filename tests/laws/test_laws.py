"""Every law, over every architecture the registry offers and every way to feed a stream."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import cycle

import pytest

from memlib.memory import MEMORIES
from memlib.training.trainer import Trainer

from .cases import (
    BASELINE,
    SEGMENT,
    VOCAB,
    Case,
    carries,
    cases,
    has_field,
    in_float32,
    small_options,
    without_small_value,
)
from .laws import (
    FEEDINGS,
    LAWS,
    MANY,
    PIECES,
    documents,
    endless,
    feed,
    horizon,
    off,
    padding,
    separate_models,
    stream,
    truncation,
)

CASES = cases()
WITH_MEMORY = [case for case in CASES if case.kinds]
PER_LAYER = [case for case in WITH_MEMORY if case.name.endswith("per_layer")]
FLOAT32 = [in_float32(case) for case in PER_LAYER if len(case.kinds) == 1]

WHOLE_BANK = Case(  # a memory that carries nothing from segment to segment
    "chapters-whole_bank", {}, {"chapters": small_options("chapters") | {"use_chapters": False}}
)


def every(name, values):
    return pytest.mark.parametrize(name, values, ids=str)


@cache
def make(case: Case):
    """A function that gives, in turn, two models of the same weights, built once for all the laws."""
    return cycle((case.build(), case.build())).__next__


@cache
def baseline(layers, dtype, window):
    return replace(BASELINE, layers=layers, dtype=dtype, window=window).build()


def plain(case: Case):
    """The transformer that a case is without its memory, built once."""
    return baseline(case.layers, case.dtype, case.window)


@cache
def closed(case: Case):
    model = deepcopy(make(case)())
    model.close_memory()
    return model


@cache
def begun(case: Case):
    return case.fresh(wo_init_zero=True)


def test_every_registered_memory_is_a_case():
    for kind in MEMORIES:
        assert has_field(kind)
        sharings = {case.config().memory.memory_sharing for case in CASES if kind in case.kinds}
        fusions = {case.config().memory.fusion for case in CASES if kind in case.kinds}
        assert sharings == {"shared", "per_layer", "every_k_layers"}
        assert fusions == {"softmax", "residual"}
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", MEMORIES)
def test_every_size_option_has_a_small_value(kind):
    assert not without_small_value(kind), (
        f"{kind}: {without_small_value(kind)} are integers without a value for tests; "
        f"add small=… to their option() in memlib/config/memory.py"
    )


@every("case", WITH_MEMORY)
def test_what_was_said_before_is_read(case: Case):
    """The laws mean something only for models whose memory has an effect, and has none where it says so."""
    model, tokens = make(case)(), stream(MANY)
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % VOCAB
    (before, _), (after, _) = feed(model, tokens), feed(model, changed)
    effect = float((after - before)[:, -SEGMENT:].abs().max())
    assert effect > 1e-6 if carries(case.config()) else effect == 0


@every("feeding", FEEDINGS)
@every("law", LAWS)
@every("case", CASES)
def test_law(case: Case, law, feeding):
    LAWS[law](make(case), feeding)


@every("case", CASES)
def test_padding_leaves_no_trace(case: Case):
    padding(make(case))


@every("case", [case for case in CASES if case.name.endswith(("per_layer", "-shared"))])
def test_documents_in_a_row_are_read_alone(case: Case):
    documents(make(case))


@every("case", CASES)
def test_vanilla_mode_is_the_plain_transformer(case: Case):
    off(case.fresh(vanilla_mode=True), plain(case), PIECES)


@every("feeding", FEEDINGS)
@every("case", CASES)
def test_a_closed_memory_is_the_plain_transformer(case: Case, feeding):
    off(closed(case), plain(case), feeding)


@every("feeding", FEEDINGS)
@every("case", [case for case in CASES if case.memory.get("fusion") == "residual"])
def test_a_residual_memory_starts_as_the_plain_transformer(case: Case, feeding):
    off(begun(case), plain(case), feeding)


@every("case", CASES)
def test_two_models_share_nothing(case: Case):
    separate_models(make(case))


@every("case", CASES)
def test_a_long_stream_stays_finite(case: Case):
    endless(make(case))


@every("case", CASES)
def test_detach_cuts_the_gradient(case: Case):
    truncation(make(case))


@every("case", [*PER_LAYER, WHOLE_BANK])
def test_horizon_cuts_the_gradient_in_training(case: Case):
    horizon(Trainer, case)


@every("feeding", [feeding for feeding in FEEDINGS if feeding.name in ("padded", "token_by_token")])
@every("case", FLOAT32)
def test_the_laws_hold_in_float32(case: Case, feeding):
    """With masks, and in the most pieces: how a stream is cut otherwise is not a matter of rounding."""
    for law in LAWS.values():
        law(make(case), feeding)
    off(closed(case), plain(case), feeding)


@every("case", FLOAT32)
def test_padding_and_detach_in_float32(case: Case):
    padding(make(case))
    truncation(make(case))
    separate_models(make(case))
