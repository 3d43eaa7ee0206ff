"""Banks of learnable memory tokens, read by attention.

Axes: m memory tokens, d their width, e columns of a matrix, r rank, t tokens of a chapter.

A bank returns tokens by index, so reading a few chapters costs only those. Its parameters are in `Rows`,
which `memlib.memory.chapters.quantization` can replace by quantised rows.

| bank | parameters | with 4096 tokens of width 4096, r = 512 |
| --- | --- | --- |
| standard | m d | 16,777,216 (67 MB in float32) |
| factorised | (m + d) r | 4,194,304, a quarter |
| reduced | m r | 2,097,152, an eighth |

Source: "Core Package", Memory Bank Implementations; docs/coverage.md corrects its figures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from einops import einsum, rearrange
from torch import Tensor, nn


class Rows(nn.Module):
    """A matrix that returns selected rows: rows(index [...]) -> [... e], or rows() -> all [m e]."""

    def __init__(self, num_rows: int, dim: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_rows, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, 0.0, self.std)

    def forward(self, index: Tensor | None = None) -> Tensor:
        return self.weight if index is None else self.weight[index]


class MemoryBank(nn.Module, ABC):
    """`num_tokens` learnable tokens of width `dim`.

    bank() -> all tokens [m d]; bank(index [...]) -> the tokens at these indices [... d].
    """

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        if num_tokens < 1 or dim < 1:
            raise ValueError(f"num_tokens, dim = {num_tokens}, {dim}: both must be at least 1")
        self.num_tokens, self.dim = num_tokens, dim

    @abstractmethod
    def forward(self, index: Tensor | None = None) -> Tensor: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters and buffers, including a quantised bank's scales."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, dim={self.dim}"


class StandardMemoryBank(MemoryBank):
    """The matrix M itself: m d parameters, initially normal with standard deviation init_std."""

    def __init__(self, num_tokens: int, dim: int, init_std: float = 0.02) -> None:
        super().__init__(num_tokens, dim)
        self.tokens = Rows(num_tokens, dim, init_std)

    def forward(self, index: Tensor | None = None) -> Tensor:
        return self.tokens(index)


class FactorizedMemoryBank(MemoryBank):
    """M = A B^T, A: [m r], B: [d r]: (m + d) r parameters. The product's initial deviation is init_std."""

    def __init__(self, num_tokens: int, dim: int, rank: int = 64, init_std: float = 0.02) -> None:
        super().__init__(num_tokens, dim)
        check_rank(rank)
        std = (init_std / rank**0.5) ** 0.5
        self.left, self.right = Rows(num_tokens, rank, std), Rows(dim, rank, std)

    def forward(self, index: Tensor | None = None) -> Tensor:
        return einsum(self.left(index), self.right(), "... r, d r -> ... d")


class ReducedDimMemoryBank(MemoryBank):
    """Tokens of width r: m r parameters. Attention over them works at that width (`MemoryCrossAttention`)."""

    def __init__(self, num_tokens: int, rank: int = 64, init_std: float = 0.02) -> None:
        check_rank(rank)
        super().__init__(num_tokens, rank)
        self.tokens = Rows(num_tokens, rank, init_std)

    def forward(self, index: Tensor | None = None) -> Tensor:
        return self.tokens(index)


class ChapteredMemoryBank(MemoryBank):
    """A bank divided into chapters of equal length: chapter i is tokens i t … i t + t - 1.

    bank.chapters(index [...]) -> [... t d]. `tokens_per_chapter` may be omitted; else it must agree.
    """

    def __init__(self, bank: MemoryBank, num_chapters: int, tokens_per_chapter: int | None = None) -> None:
        super().__init__(bank.num_tokens, bank.dim)
        self.bank, self.num_chapters = bank, num_chapters
        self.tokens_per_chapter = tokens_per_chapter or bank.num_tokens // max(num_chapters, 1)
        if num_chapters < 1 or num_chapters * self.tokens_per_chapter != bank.num_tokens:
            raise ValueError(
                f"num_chapters = {num_chapters} of {self.tokens_per_chapter} tokens: must add up to the "
                f"bank's {bank.num_tokens} tokens; choose a divisor of that"
            )

    def forward(self, index: Tensor | None = None) -> Tensor:
        return self.bank(index)

    def chapters(self, index: Tensor) -> Tensor:
        """The tokens of chapters with indices [...]: [... t d]; no other token is read."""
        place = torch.arange(self.tokens_per_chapter, device=index.device)
        return self.bank(rearrange(index, "... -> ... 1") * self.tokens_per_chapter + place)


def create_memory_bank(
    num_tokens: int,
    dim: int,
    use_low_rank: bool = False,
    rank: int = 64,
    low_rank_mode: str = "factorized",
    init_std: float = 0.02,
) -> MemoryBank:
    """Build a bank; low_rank_mode: "factorized" or "reduced_dim". Raises ValueError for invalid options."""
    if low_rank_mode not in ("factorized", "reduced_dim"):
        raise ValueError(f"low_rank_mode = {low_rank_mode!r}: expected 'factorized' or 'reduced_dim'")
    if not use_low_rank:
        return StandardMemoryBank(num_tokens, dim, init_std)
    if low_rank_mode == "factorized":
        return FactorizedMemoryBank(num_tokens, dim, rank, init_std)
    return ReducedDimMemoryBank(num_tokens, rank, init_std)


def check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank = {rank}: must be at least 1")
