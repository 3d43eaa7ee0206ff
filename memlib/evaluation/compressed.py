"""How few bytes a trained bank can do with: rank and bits against accuracy, nothing trained again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum

from memlib.evaluation.evaluate import evaluate
from memlib.memory.chapters.banks import (
    ChapteredMemoryBank,
    FactorizedMemoryBank,
    MemoryBank,
    StandardMemoryBank,
)
from memlib.memory.chapters.memory import ChapterMemory
from memlib.memory.chapters.quantization import QuantizedMemoryBank
from memlib.models.transformer import MemoryTransformer
from memlib.tasks import Task

RANKS, BITS = (1, 2, 4, 8, 16, None), (32, 8, 4)


@dataclass(frozen=True)
class Compressed:
    """A bank kept at a rank (None: as it is) and with so many bits: its bytes, and the accuracy with it.

    Rank 0 is a bank of zeros, in no bytes: the control.
    """

    rank: int | None
    bits: int
    nbytes: int
    accuracy: float


@torch.no_grad()
def low_rank(bank: MemoryBank, rank: int) -> FactorizedMemoryBank:
    """The nearest bank of a rank: with M = U S V^T, A = U_r sqrt(S_r), B = V_r sqrt(S_r).

    No other of that rank is nearer in the sum of squares (Eckart and Young 1936). Raises ValueError
    where the rank is above what a matrix of that shape can have.
    """
    tokens = bank()
    if not 1 <= rank <= min(tokens.shape):
        raise ValueError(f"rank = {rank}: must be 1 … {min(tokens.shape)} for {tuple(tokens.shape)} numbers")
    u, s, v = torch.linalg.svd(tokens, full_matrices=False)
    root = s[:rank].sqrt()
    kept = FactorizedMemoryBank(bank.num_tokens, bank.dim, rank).to(tokens)
    kept.left.weight.copy_(einsum(u[:, :rank], root, "m r, r -> m r"))
    kept.right.weight.copy_(einsum(v[:rank], root, "r d, r -> d r"))
    return kept


@torch.no_grad()
def compress(bank: MemoryBank, rank: int | None, bits: int, group_size: int = 64) -> MemoryBank:
    """A bank at a rank (None: as it is) and 32, 8 or 4 bits, packed; the given one is not changed."""
    kept: MemoryBank = low_rank(bank, rank) if rank is not None else whole(bank)
    return kept if bits == 32 else QuantizedMemoryBank(kept, bits, group_size).pack()


def whole(bank: MemoryBank) -> StandardMemoryBank:
    """The same tokens as plain rows."""
    tokens = bank()
    kept = StandardMemoryBank(bank.num_tokens, bank.dim).to(tokens)
    kept.tokens.weight.data.copy_(tokens)
    return kept


@torch.no_grad()
def bytes_against_accuracy(
    model: MemoryTransformer,
    task: Task,
    ranks: tuple[int | None, ...] = RANKS,
    bits: tuple[int, ...] = BITS,
    examples: int = 256,
) -> list[Compressed]:
    """Nothing, then every rank with every number of bits, for a model with one bank; it ends as it began.

    Rank None is the bank as it is. Odd ranks have no 4 bits. Raises ValueError for a model
    without such a bank, or with several.
    """
    memories = [m for m in model.modules() if isinstance(m, ChapterMemory)]
    if len(memories) != 1:
        raise ValueError(
            f"this model has {len(memories)} banks of learnable tokens: one is needed; set memory.kinds: "
            "[chapters], and memory.memory_layer_placement to one layer"
        )
    (memory,) = memories
    trained = memory.bank
    tokens = trained.bank if isinstance(trained, ChapteredMemoryBank) else trained
    results = []

    def read_from(bank: MemoryBank) -> float:
        memory.bank = bank
        if isinstance(trained, ChapteredMemoryBank):
            memory.bank = ChapteredMemoryBank(bank, trained.num_chapters)
        return round(evaluate(model, task, examples).accuracy, 4)

    try:
        nothing = whole(tokens)
        nothing.tokens.weight.data.zero_()
        results.append(Compressed(0, 32, 0, read_from(nothing)))
        for rank in ranks:
            for b in bits:
                if b == 4 and rank is not None and rank % 2:
                    continue  # an odd row cannot be packed two to a byte
                kept = compress(tokens, rank, b)
                results.append(Compressed(rank, b, kept.nbytes, read_from(kept)))
    finally:
        memory.bank = trained
    return results


def compressed_table(runs: list[list[Compressed]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table, one row a rank and number of bits, fewest bytes first: the span of runs."""
    rows = []
    for same in sorted(zip(*runs, strict=True), key=lambda same: same[0].nbytes):
        scores = sorted(r.accuracy for r in same)
        rank = "whole" if same[0].rank is None else str(same[0].rank)
        span = f"{scores[0]:.3f} – {scores[-1]:.3f}"
        rows.append([rank, str(same[0].bits), f"{same[0].nbytes:,}", span])
    return ["rank", "bits", "bytes", "accuracy"], rows
