"""Sampling of the next token: greedy, or random with temperature, top-k and top-p.

Axes: r rows, v vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Mask all but the k highest logits of each row with -inf; ties with the k-th stay: [r v].

    Source: Fan et al. 2018, arXiv 1805.04833.
    """
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Mask all but the smallest set of tokens with total probability p or more with -inf: [r v].

    A token stays if the more probable tokens sum to less than p, so at least one token stays.
    Source: nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751.
    """
    ordered, order = torch.sort(torch.softmax(logits, -1), dim=-1, descending=True, stable=True)
    dropped = torch.cumsum(ordered, -1) - ordered >= max(p, torch.finfo(ordered.dtype).tiny)
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """softmax(logits / temperature) after top-k and then top-p masking: [r v].

    temperature = 0 puts probability 1 on the highest logit; ties go to the first token.
    """
    if not temperature:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    # Subtract the maximum, so that dividing by a small temperature cannot overflow.
    scores = (logits - reduce(logits, "r v -> r 1", "max")) / temperature
    if top_k is not None:
        scores = keep_top_k(scores, top_k)
    if top_p is not None:
        scores = keep_top_p(scores, top_p)
    return torch.softmax(scores, -1)


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generators: Sequence[torch.Generator | None],
) -> Tensor:
    """Choose each row's next token, sampled with the row's generator (None: torch's): [r v] -> [r]."""
    if not temperature:
        return logits.argmax(-1)
    drawn = [
        torch.multinomial(row.to(generator.device if generator else row.device), 1, generator=generator)
        for row, generator in zip(probabilities(logits, temperature, top_k, top_p), generators, strict=True)
    ]
    return rearrange([token.to(logits.device) for token in drawn], "r 1 -> r")


def seeded(*names: object) -> torch.Generator:
    """A reproducible generator for each name, e.g. `seeded(0, "row", 3)`; equal in every process."""
    digest = hashlib.sha256("/".join(map(repr, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
