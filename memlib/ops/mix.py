"""A weighted sum of a few sources, with weights per token.

Axes: b batch, n tokens, m sources, d features.    y_n = sum_m weight_nm source_m,n

As one einsum this is a product of b n tiny matrices, which torch's CPU kernels execute one by one. Written
source by source it is m passes over [b n d].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor


def mix(weight: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """weight: [b n m]; sources: m tensors [b n d] -> [b n d].

    Weights (1, 0, …) give the first source bit for bit, if the others are finite.
    """
    shares = weight.split(1, -1)
    y = shares[0] * sources[0]
    for share, source in zip(shares[1:], sources[1:], strict=True):
        y = torch.addcmul(y, share, source)
    return y


def mix_reference(weight: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """`mix` as one einsum."""
    return einsum(weight, torch.stack(list(sources), -2), "b n m, b n m d -> b n d")
