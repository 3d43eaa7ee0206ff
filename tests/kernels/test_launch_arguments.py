"""The interpreter refuses a launch that the compiler would refuse."""

from __future__ import annotations

import pytest
import torch

from memlib_kernels.interpreter import interpreted
from memlib_kernels.launch import launch
from memlib_kernels.silu_mul_kernel import silu_mul_forward


def test_missing_and_unknown_arguments_are_named():
    x, options = torch.ones(2, 3), {"BLOCK_N": 16, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}
    with interpreted():
        with pytest.raises(TypeError, match="without ACC"):
            launch(silu_mul_forward, (1, 1), x, x, x, 3, 3, 2, 3, **options)
        with pytest.raises(TypeError, match="no argument BLOCK_E"):
            launch(silu_mul_forward, (1, 1), x, x, x, 3, 3, 2, 3, **options, ACC=None, BLOCK_E=16)
