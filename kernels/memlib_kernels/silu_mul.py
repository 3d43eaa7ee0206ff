"""SwiGLU's product of two projections.    y = silu(gate) up,    silu(x) = x sigma(x)

Source: Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.launch import runs_triton
from memlib_kernels.silu_mul_op import silu_mul_op


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: of one shape -> the same shape. A kernel keeps float32 between the two operations."""
    if runs_triton(gate, up) and gate.shape == up.shape and gate.dtype == up.dtype:
        return silu_mul_op(gate, up)
    return F.silu(gate) * up


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` as its formula says."""
    return gate * torch.sigmoid(gate) * up
