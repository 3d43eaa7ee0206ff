"""Two wrong delta rules obey every law; only the comparison with the reference fails them."""

import pytest

from memlib.memory import MEMORIES
from tests.laws import laws
from tests.laws.cases import carries, cases, in_float32, small_options, without_memory
from tests.laws.test_laws import test_what_was_said_before_is_read as is_read
from tests.laws.toys import register

from .delta import DeltaConfig, DeltaMemory, DeltaReference, OnlyTheFirstChunk, WithoutTheSolve
from .references import REFERENCES
from .references.compare import agree, build


@pytest.fixture
def registered(monkeypatch):
    """A function that registers a memory as `delta`, with its reference."""

    def register_(memory):
        register(monkeypatch, delta=(memory, DeltaConfig))
        monkeypatch.setitem(REFERENCES, "delta", DeltaReference)

    return register_


@pytest.mark.parametrize("memory", [DeltaMemory, OnlyTheFirstChunk, WithoutTheSolve])
def test_right_and_wrong_obey_every_law(registered, memory):
    registered(memory)
    (case,) = (case for case in cases() if case.name == "delta-per_layer")
    assert type(case.build().blocks[0].memories["delta"]) is memory and carries(case.config())
    is_read(case)
    for of in (case, in_float32(case)):
        for feeding in laws.FEEDINGS:
            for law in laws.LAWS.values():
                law(of.build, feeding)
        laws.padding(of.build)
    laws.separate_models(case.build)
    laws.truncation(case.build)
    laws.endless(case.build)
    model = case.build()
    model.close_memory()
    laws.off(model, without_memory(case).build(), laws.MANY)


@pytest.mark.parametrize("training", [False, True], ids=["in_use", "in_training"])
@pytest.mark.parametrize("options", [{}, *DeltaReference.variants])
def test_the_right_one_is_its_reference(registered, options, training):
    registered(DeltaMemory)
    agree(*build("delta", small_options("delta") | options, training))


@pytest.mark.parametrize("wrong", [OnlyTheFirstChunk, WithoutTheSolve])
def test_a_wrong_one_is_not(registered, wrong):
    registered(wrong)
    assert MEMORIES["delta"] is wrong
    with pytest.raises(AssertionError, match=r"^state of row 0 after segment 0: matrix: differs"):
        agree(*build("delta", small_options("delta")))
