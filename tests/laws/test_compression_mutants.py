"""Faults of compression that the laws must catch: who survives is where rows, padding and time can mix."""

import itertools

import pytest
import torch

from memlib.memory import ltm

from . import laws
from .cases import Case
from .laws import FEEDINGS

MANY = next(feeding for feeding in FEEDINGS if feeding.name == "many_segments")


def make(keep="learned"):
    return Case("mutant", {}, {"ltm": {"num_slots": 8, "slot_dim": 16, "keep": keep}}).build


def of_the_batch(order, mask, ratio):
    """The most important tokens of all rows together."""
    count = round(ratio * order.numel())
    return (order >= order.flatten().topk(count).values[-1]) & mask


def padding_too(order, mask, ratio):
    """Padding competes for its place like a token."""
    rank = order.argsort(-1, descending=True).argsort(-1)
    return rank < ratio * mask.shape[1]


def by_position(mask, segments):
    """Lots drawn by where a token stands, padding included: the middle of a segment wins."""
    place = torch.arange(mask.shape[1]).double()
    return -(place - place.mean()).square().expand(mask.shape)


@pytest.mark.parametrize("keep", ["learned", "random"])
def test_without_a_fault_they_hold(keep):
    laws.isolation(make(keep), MANY)
    laws.padding(make(keep))
    laws.explicit_state(make(keep), MANY)


def test_survivors_of_the_whole_batch_are_caught(monkeypatch):
    monkeypatch.setattr(ltm, "survivors", of_the_batch)
    with pytest.raises(AssertionError, match=r"^L3"):
        laws.isolation(make(), MANY)


def test_padding_that_competes_is_caught(monkeypatch):
    monkeypatch.setattr(ltm, "survivors", padding_too)
    with pytest.raises(AssertionError, match=r"^L4"):
        laws.padding(make())


def test_lots_by_position_are_caught(monkeypatch):
    monkeypatch.setattr(ltm, "lottery", by_position)
    with pytest.raises(AssertionError, match=r"^L4"):
        laws.padding(make("random"))


def test_lots_drawn_anew_at_every_call_are_caught(monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(
        ltm,
        "lottery",
        lambda mask, _: torch.rand(mask.shape, generator=torch.Generator().manual_seed(next(calls))),
    )
    with pytest.raises(AssertionError, match=r"^L2"):
        laws.explicit_state(make("random"), MANY)
