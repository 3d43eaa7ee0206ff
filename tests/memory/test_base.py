"""What every state can do: written once, for flat and nested ones."""

from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from memlib.memory import Memory, State, axes


@dataclass(frozen=True)
class Inner(State):
    count: Tensor = axes("batch token")


@dataclass(frozen=True)
class Outer(State):
    slots: Tensor = axes("batch slot feature")
    layers: tuple[Tensor, ...] = axes("batch token")
    parts: tuple[Inner, ...]
    inner: Inner


def outer(seed=0, batch=3):
    torch.manual_seed(seed)
    return Outer(
        slots=torch.randn(batch, 2, 4),
        layers=(torch.randn(batch, 2), torch.randn(batch, 0, 5)),
        parts=(Inner(torch.randint(9, (batch,))),),
        inner=Inner(torch.randint(9, (batch, 1))),
    )


def values(state):
    return [tensor.tolist() for _, tensor in state.named_tensors()]


def test_every_tensor_has_a_dotted_name_in_a_fixed_order():
    names = [name for name, _ in outer().named_tensors()]
    assert names == ["slots", "layers.0", "layers.1", "parts.0.count", "inner.count"]


def test_map_changes_every_tensor_and_keeps_the_structure():
    state = outer()
    doubled = state.map(lambda tensor: 2 * tensor)
    assert type(doubled) is Outer and type(doubled.parts[0]) is Inner
    for (_, before), (_, after) in zip(state.named_tensors(), doubled.named_tensors(), strict=True):
        assert torch.equal(after, 2 * before)


def test_a_state_is_frozen_and_no_method_changes_it():
    state = outer()
    before = values(state)
    state.map(torch.zeros_like), state.clone(), state.rows(torch.tensor([2]))
    state.where(torch.tensor([True, False, True]), outer(1))
    assert values(state) == before
    with pytest.raises(FrozenInstanceError):
        state.slots = torch.zeros(1)


def test_join_puts_batches_one_behind_the_other():
    states = outer(0), outer(1, batch=1), outer(2, batch=2)
    joined = states[0].join(*states[1:])
    first = 0
    for state in states:
        count = state.slots.shape[0]
        assert values(joined.rows(torch.arange(first, first + count))) == values(state)
        first += count
    assert joined.slots.shape[0] == first == 6
    assert values(states[0].join()) == values(states[0])


def test_where_takes_rows_from_one_state_or_the_other():
    mine, other = outer(0), outer(1)
    mixed = mine.where(torch.tensor([True, False, True]), other)
    for (_, got), (_, a), (_, b) in zip(
        mixed.named_tensors(), mine.named_tensors(), other.named_tensors(), strict=True
    ):
        assert torch.equal(got, torch.stack((a[0], b[1], a[2])))


def test_rows_picks_repeats_and_reorders():
    picked = outer().rows(torch.tensor([2, 0, 0, 1]))
    for (_, got), (_, from_) in zip(picked.named_tensors(), outer().named_tensors(), strict=True):
        assert torch.equal(got, from_[[2, 0, 0, 1]])


def test_a_clone_shares_no_memory():
    state = outer()
    copy = state.clone()
    copy.slots.zero_()
    assert state.slots.any()


def test_detach_cuts_and_keeps_the_values():
    state = Inner(torch.ones(2, requires_grad=True) * 3)
    assert state.count.requires_grad and not state.detach().count.requires_grad
    assert torch.equal(state.detach().count, state.count)


def test_to_moves_and_converts():
    assert outer().to(torch.float64).slots.dtype == torch.float64


def test_nbytes_counts_every_tensor():
    assert outer().nbytes == (3 * 2 * 4 + 3 * 2 + 0) * 4 + (3 + 3) * 8


def test_a_saved_state_loads_into_a_state_of_its_structure():
    state, tensors = outer(0), dict(outer(0).named_tensors())
    loaded = outer(1).load(load(save(tensors)))
    assert values(loaded) == values(state)


def test_a_state_that_lacks_a_tensor_is_refused_by_name():
    tensors = dict(outer().named_tensors())
    del tensors["parts.0.count"], tensors["inner.count"]
    with pytest.raises(KeyError, match=r"lacks 'parts.0.count' \(2 of 5 tensors missing\)"):
        outer().load(tensors)


def test_a_memory_without_its_three_functions_cannot_be_made():
    class Half(Memory):
        def init_state(self, batch_size):
            return Inner(torch.zeros(batch_size))

    with pytest.raises(TypeError, match="abstract"):
        Half()
