"""Banks: what they hold, what a reader of some tokens gets, and how many numbers that takes."""

import pytest
import torch

from memlib import (
    ChapteredMemoryBank,
    FactorizedMemoryBank,
    MemoryBank,
    QuantizedMemoryBank,
    ReducedDimMemoryBank,
    StandardMemoryBank,
    count_parameters,
    create_memory_bank,
)

BANKS = {
    "standard": lambda: StandardMemoryBank(12, 6),
    "factorized": lambda: FactorizedMemoryBank(12, 6, rank=4),
    "reduced": lambda: ReducedDimMemoryBank(12, rank=4),
    "quantized": lambda: QuantizedMemoryBank(StandardMemoryBank(12, 6), bits=4, group_size=4),
    "packed": lambda: QuantizedMemoryBank(FactorizedMemoryBank(12, 6, rank=4), bits=8).pack(),
}
every_bank = pytest.mark.parametrize("make", BANKS.values(), ids=BANKS.keys())


@pytest.mark.parametrize(
    ("options", "kind", "count"),
    [
        ({}, StandardMemoryBank, 4096 * 4096),
        ({"use_low_rank": True, "rank": 512}, FactorizedMemoryBank, (4096 + 4096) * 512),
        (
            {"use_low_rank": True, "rank": 512, "low_rank_mode": "reduced_dim"},
            ReducedDimMemoryBank,
            4096 * 512,
        ),
    ],
)
def test_the_documents_sizes(options, kind, count):
    with torch.device("meta"):
        bank = create_memory_bank(4096, 4096, **options)
    assert type(bank) is kind and isinstance(bank, MemoryBank)
    assert count_parameters(bank) == count
    assert count in (16_777_216, 4_194_304, 2_097_152)


@every_bank
@pytest.mark.parametrize("index", [(0,), (11, 3, 3), ((5, 4), (0, 1), (7, 7))])
def test_some_tokens_are_those_of_all_tokens(make, index):
    bank, index = make(), torch.tensor(index)
    assert bank().shape == (bank.num_tokens, bank.dim)
    torch.testing.assert_close(bank(index), bank()[index])


def test_a_factorized_bank_is_the_product_of_its_factors():
    bank = FactorizedMemoryBank(5, 4, rank=2)
    left, right = bank.left.weight.tolist(), bank.right.weight.tolist()
    want = [[sum(left[m][r] * right[d][r] for r in range(2)) for d in range(4)] for m in range(5)]
    torch.testing.assert_close(bank(), torch.tensor(want))


@pytest.mark.parametrize("options", [{}, {"use_low_rank": True}, {"use_low_rank": True, "rank": 8}])
def test_tokens_start_with_the_given_deviation(options):
    torch.manual_seed(0)
    assert float(create_memory_bank(2000, 128, init_std=0.05, **options)().std()) == pytest.approx(
        0.05, rel=0.2
    )


@every_bank
def test_chapters_are_consecutive_tokens(make):
    bank = make()
    book = ChapteredMemoryBank(bank, num_chapters=4)
    index = torch.tensor([[2, 0], [3, 3]])
    got = book.chapters(index)
    assert got.shape == (2, 2, 3, bank.dim)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        chapter = int(index[place])
        torch.testing.assert_close(got[place], bank()[3 * chapter : 3 * chapter + 3])
    torch.testing.assert_close(book(), bank())
    assert count_parameters(book) == count_parameters(bank)


def test_only_the_chosen_chapters_tokens_get_a_gradient():
    bank = ChapteredMemoryBank(StandardMemoryBank(12, 6), 4)
    bank.chapters(torch.tensor([1, 3])).sum().backward()
    touched = bank.bank.tokens.weight.grad.any(1).tolist()
    assert touched == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_memory_bank(4, 4, True, low_rank_mode="lora"), "low_rank_mode = 'lora': expected"),
        (lambda: create_memory_bank(0, 4), "num_tokens, dim = 0, 4"),
        (lambda: FactorizedMemoryBank(4, 4, rank=0), "rank = 0: must be at least 1"),
        (lambda: ReducedDimMemoryBank(4, rank=-1), "rank = -1: must be at least 1"),
        (
            lambda: ChapteredMemoryBank(StandardMemoryBank(12, 4), 5),
            "num_chapters = 5 of 2 tokens: must",
        ),
        (lambda: ChapteredMemoryBank(StandardMemoryBank(12, 4), 4, 2), "num_chapters = 4 of 2 tokens"),
        (lambda: ChapteredMemoryBank(StandardMemoryBank(12, 4), 0), "num_chapters = 0 of"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
