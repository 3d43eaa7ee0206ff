"""Which implementation of an operation runs.

Every operation of `memlib_kernels` has a reference of plain torch and einops. Plain CPU tensors in eager mode
take a faster path that is written by hand. `torch.compile` and `torch.export` trace the reference, unless an
operation says otherwise: the compiler fuses it, and an exported program contains ATen operators only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def eager_cpu(*tensors: Tensor | None) -> bool:
    """True if all tensors are plain CPU tensors (no subclass), outside tracing and autocast.

    Under autocast the reference runs, whose products torch casts one by one.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu") for t in tensors)
