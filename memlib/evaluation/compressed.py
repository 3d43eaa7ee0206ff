"""Compression of a trained bank without further training: accuracy by rank and bits.

Axes: m memory tokens, r rank, d width.
"""

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
    """Bytes of a bank and the model's accuracy with it, at one rank (None: full) and number of bits.

    Rank 0 is the control: a bank of zeros, which needs no bytes.
    """

    rank: int | None
    bits: int
    nbytes: int
    accuracy: float


@torch.no_grad()
def low_rank(bank: MemoryBank, rank: int) -> FactorizedMemoryBank:
    """The best approximation of a bank at a rank: with M = U S V^T, A = U_r sqrt(S_r), B = V_r sqrt(S_r).

    It minimises the squared error among all banks of that rank (Eckart and Young 1936). Raises ValueError
    if the rank is not in 1 … min(m, d).
    """
    tokens = bank()
    if not 1 <= rank <= min(tokens.shape):
        raise ValueError(
            f"rank = {rank}: must be 1 … {min(tokens.shape)} for a bank of {tuple(tokens.shape)}"
        )
    u, s, v = torch.linalg.svd(tokens, full_matrices=False)
    root = s[:rank].sqrt()
    kept = FactorizedMemoryBank(bank.num_tokens, bank.dim, rank).to(tokens)
    kept.left.weight.copy_(einsum(u[:, :rank], root, "m r, r -> m r"))
    kept.right.weight.copy_(einsum(v[:rank], root, "r d, r -> d r"))
    return kept


@torch.no_grad()
def compress(bank: MemoryBank, rank: int | None, bits: int, group_size: int = 64) -> MemoryBank:
    """A copy of a bank at a rank (None: full) and 32, 8 or 4 bits, packed."""
    kept: MemoryBank = low_rank(bank, rank) if rank is not None else whole(bank)
    return kept if bits == 32 else QuantizedMemoryBank(kept, bits, group_size).pack()


def whole(bank: MemoryBank) -> StandardMemoryBank:
    """A copy of a bank's tokens in a `StandardMemoryBank`."""
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
    """Accuracy with a bank of zeros, then with every rank and number of bits; the model is not changed.

    Rank None is the full bank. Odd ranks are skipped at 4 bits. Raises ValueError unless the model has
    exactly one bank.
    """
    memories = [m for m in model.modules() if isinstance(m, ChapterMemory)]
    if len(memories) != 1:
        raise ValueError(
            f"this model has {len(memories)} banks of learnable tokens: exactly one is required; set "
            "memory.kinds: [chapters], and memory.memory_layer_placement to one layer"
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
                    continue  # two 4-bit values share a byte, so a row needs an even width
                kept = compress(tokens, rank, b)
                results.append(Compressed(rank, b, kept.nbytes, read_from(kept)))
    finally:
        memory.bank = trained
    return results


def compressed_table(runs: list[list[Compressed]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: the range of accuracy over runs, by rank and bits, fewest bytes first."""
    rows = []
    for same in sorted(zip(*runs, strict=True), key=lambda same: same[0].nbytes):
        scores = sorted(r.accuracy for r in same)
        rank = "whole" if same[0].rank is None else str(same[0].rank)
        span = f"{scores[0]:.3f} – {scores[-1]:.3f}"
        rows.append([rank, str(same[0].bits), f"{same[0].nbytes:,}", span])
    return ["rank", "bits", "bytes", "accuracy"], rows
