"""A state that is not the model's is refused at the door, with the tensor, the shape found and expected."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memlib.config import override
from memlib.memory import MEMORIES, State, axes
from memlib.models import MemoryState, MemoryTransformer
from tests.laws.cases import BATCH, SEGMENT, VOCAB, Case, variants

IDS = torch.randint(VOCAB, (BATCH, SEGMENT), generator=torch.Generator().manual_seed(0))
EACH = [Case(kind, {"memory_sharing": "per_layer"}, {kind: variants(kind)[0]}) for kind in MEMORIES]


def other(case, **changes):
    """A model of the same case in other sizes."""
    config = override(case.config(), {name.replace("__", "."): value for name, value in changes.items()})
    return MemoryTransformer(config).double()


def refused(model, state, message):
    with pytest.raises(ValueError, match=message):
        model(IDS, memory_state=state)


@pytest.mark.parametrize("mine", EACH, ids=str)
@pytest.mark.parametrize("theirs", [*EACH, Case("baseline", {}, {})], ids=str)
def test_a_state_of_another_kind_is_refused(mine, theirs):
    if mine is theirs:
        mine.build()(IDS, memory_state=mine.build()(IDS).memory_state)
    else:
        refused(mine.build(), theirs.build()(IDS).memory_state, r"memory_state.*start from None")


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_state_of_other_sizes_is_refused_by_tensor_and_shape(case):
    model = case.build()
    wider = other(case, model__hidden_dim=32)
    refused(model, wider(IDS).memory_state, r"memory_state\S+ has shape \[.*\]: this model expects \[batch")
    refused(model, other(case, model__num_layers=4)(IDS).memory_state, "4 layers")
    refused(model, model(IDS[:2]).memory_state, "holds 2 streams, input_ids 3")


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_state_with_a_longer_open_segment_is_refused(case):
    """Without the check it would give logits of the wrong length."""
    room = {"memory__external__capacity": 4 * SEGMENT} if "external" in case.kinds else {}
    longer = other(case, model__segment_length=2 * SEGMENT, **room)
    state = longer(torch.cat((IDS, IDS[:, :2]), 1)).memory_state
    assert state.window.length > SEGMENT
    refused(
        case.build(), state, rf"window.mask has shape \[3, {SEGMENT + 2}\]: a segment of this model has 4"
    )


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_state_in_another_type_is_refused_and_cast_by_the_remedy(case):
    model = case.build()
    state = model(IDS).memory_state
    refused(model, state.cast(torch.float32), r"keeps its state in torch.float64.*memory_state.cast")
    model(IDS, memory_state=state.cast(torch.float32).cast(torch.float64))


def test_damaged_windows_and_strangers_are_refused():
    model = EACH[0].build()
    state = model(IDS[:, :2]).memory_state
    keys = (state.window.keys[0][:, :, :1], *state.window.keys[1:])
    refused(model, replace(state, window=replace(state.window, keys=keys)), r"window.keys.0 has 1 tokens")
    refused(model, {"slots": 1}, "memory_state is a dict: expected a MemoryState")
    refused(model, replace(state, memories=state.memories[:1]), "holds 1 states, this model has 3")


def test_a_field_may_not_hide_a_method_of_state():
    with pytest.raises(TypeError, match=r"Bad.rows: State has a method of that name"):

        @dataclass(frozen=True)
        class Bad(State):
            rows: Tensor = axes("batch")


def test_a_tensor_names_its_axes():
    with pytest.raises(TypeError, match=r"Bare.slots: name its axes"):

        @dataclass(frozen=True)
        class Bare(State):
            slots: Tensor


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_state_is_a_pytree_whose_tensors_have_named_axes(case):
    state = case.build()(IDS[:, :2]).memory_state
    leaves, structure = pytree.tree_flatten(state)
    assert all(mine is theirs for mine, (_, theirs) in zip(leaves, state.named_tensors(), strict=True))
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, MemoryState) and again.layout == state.layout
    for name, tensor, labels in state.labelled_tensors():
        assert len(labels) == tensor.ndim and labels[0] == "batch", name
        assert tensor.shape[0] == BATCH
