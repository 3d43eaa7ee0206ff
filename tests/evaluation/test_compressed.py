"""A bank in fewer bytes: the nearest of its rank, the bytes it says, and a model that ends as it began."""

import pytest
import torch

from memlib import MemoryTransformer, load_config
from memlib.evaluation import evaluate
from memlib.evaluation.compressed import bytes_against_accuracy, compress, low_rank
from memlib.memory.chapters.banks import FactorizedMemoryBank, StandardMemoryBank
from memlib.memory.chapters.quantization import QuantizedMemoryBank
from memlib.tasks import make_task


def bank(m=24, d=16, rank=None, seed=0):
    torch.manual_seed(seed)
    return StandardMemoryBank(m, d, 1.0) if rank is None else FactorizedMemoryBank(m, d, rank, 1.0)


def test_a_bank_of_that_rank_is_kept_whole():
    given = bank(rank=3)
    torch.testing.assert_close(low_rank(given, 3)(), given(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 15])
def test_no_bank_of_the_rank_is_nearer(rank):
    """The error is what the smaller singular values say, and moving the factors makes it worse."""
    given = bank()
    near = low_rank(given, rank)
    error = float((near() - given()).square().sum().detach())
    rest = torch.linalg.svdvals(given().double())[rank:].square().sum()
    assert error == pytest.approx(float(rest.detach()), rel=1e-4)
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            moved = (near.left() + 0.05 * torch.randn_like(near.left())) @ near.right().T
        assert float((moved - given()).square().sum().detach()) > error


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank = {rank}: must be 1 … 16"):
        low_rank(bank(), rank)


@pytest.mark.parametrize(
    ("rank", "bits", "want"),
    [
        (None, 32, 24 * 16 * 4),
        (None, 8, 24 * (16 + 4)),
        (None, 4, 24 * (8 + 4)),
        (4, 32, (24 + 16) * 4 * 4),
        (4, 4, (24 + 16) * (2 + 4)),
    ],
)
def test_bytes_are_those_of_the_formula(rank, bits, want):
    """A group of numbers has one scale of four bytes."""
    given = bank()
    kept = compress(given, rank, bits)
    assert kept.nbytes == want
    assert kept().shape == given().shape and (bits == 32 or isinstance(kept, QuantizedMemoryBank))
    if rank is None and bits == 32:
        assert torch.equal(kept(), given())


def test_the_model_ends_as_it_began_and_whole_costs_nothing():
    torch.manual_seed(0)
    config = load_config("topics_routed")
    model, task = MemoryTransformer(config), make_task(config.task, 16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rows = bytes_against_accuracy(model, task, ranks=(2, None), bits=(32, 4), examples=64)
    assert [(r.rank, r.bits) for r in rows] == [(0, 32), (2, 32), (2, 4), (None, 32), (None, 4)]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert rows[3].accuracy == round(evaluate(model, task, 64).accuracy, 4)
