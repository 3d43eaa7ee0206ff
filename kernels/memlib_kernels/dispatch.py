"""Which implementation of an operation runs.

Every operation of `memlib_kernels` has a reference of plain torch and einops. Plain CPU tensors in eager mode
take a faster path that is written by hand. `torch.compile` and `torch.export` trace the reference, unless an
operation says otherwise: the compiler fuses it, and an exported program contains ATen operators only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def eager_cpu(*tensors: Tensor | None) -> bool:
    """True if all tensors are plain CPU tensors (no subclass), outside tracing and autocast.

    Under autocast the reference runs, whose products torch casts one by one.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu") for t in tensors)


def apply(function: Any, *args: Any) -> Any:
    """`function.apply(*args)`; only its forward pass, which is faster, where no gradient is recorded."""
    records = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
    if records or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return function.forward(*args)
