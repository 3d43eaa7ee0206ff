"""The comparisons of the other files on a real GPU: compiled kernels against float64, beside torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memlib_kernels import (
    addressed_read,
    flash_attention,
    fused_norm,
    gated_write,
    memory_attention,
    merge,
    silu_mul,
)
from memlib_kernels.addressed import addressed_read_reference
from memlib_kernels.attention import flash_attention_reference, merge_reference
from memlib_kernels.gated_write import gated_write_reference
from memlib_kernels.memory_attention import memory_attention_reference
from memlib_kernels.norm import fused_norm_reference
from memlib_kernels.silu_mul import silu_mul_reference

from .conftest import check_error, differentiated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cases() -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    torch.manual_seed(0)
    q, k, v = normal(2, 4, 300, 64), normal(2, 2, 333, 64), normal(2, 2, 333, 64)
    found: dict[str, tuple[Callable, Callable, list[Tensor]]] = {}
    for name, options in {
        "causal": {"causal": True},
        "window": {"causal": True, "window": 70},
        "whole": {},
    }.items():
        found[f"flash attention, {name}"] = (
            lambda *x, o=options: flash_attention(*x, **o),
            lambda *x, o=options: flash_attention_reference(*x, **o),
            [q, k, v],
        )
    slots = [normal(2, 2, 300, 64), normal(2, 2, 500, 64), normal(2, 2, 500, 128), normal(2, 500)]
    found["memory attention, bias"] = (
        lambda q, k, v, b: memory_attention(q, k, v, bias=b, return_lse=True),
        lambda q, k, v, b: memory_attention_reference(q, k, v, bias=b, return_lse=True),
        slots,
    )
    places = torch.randint(-1, 500, (2, 10, 40))
    found["memory attention, places"] = (
        lambda q, k, v, b: memory_attention(q, k, v, bias=b, places=places.to(q.device), return_lse=True),
        lambda q, k, v, b: memory_attention_reference(q, k, v, bias=b, places=places, return_lse=True),
        slots,
    )
    halves = [normal(2, 2, 300, 64), normal(2, 2, 300), normal(2, 2, 300, 64), normal(2, 2, 300)]
    found["merge"] = (merge, merge_reference, halves)
    table = torch.nn.functional.normalize(normal(4, 128, 32), dim=-1)
    sharp = torch.tensor(4.0, dtype=torch.float64)
    read = [normal(2, 100, 4, 32), table, sharp, normal(2, 4, 128, 64)]
    found["addressed read"] = (addressed_read, addressed_read_reference, read)
    rates = [torch.rand(2, 50, 208, dtype=torch.float64) * 0.1 for _ in range(2)]
    write = [normal(2, 208, 64), *rates, normal(2, 50, 64)]
    found["gated write"] = (gated_write, gated_write_reference, write)
    for kind in ("rms", "layer"):
        options = {"kind": kind, "activation": "relu"}
        found[f"fused norm, {kind}"] = (
            lambda x, w, b, r, o=options: fused_norm(x, w, b, residual=r, **o),
            lambda x, w, b, r, o=options: fused_norm_reference(x, w, b, residual=r, **o),
            [normal(2, 50, 304), normal(304), normal(304), normal(2, 50, 304)],
        )
    found["silu mul"] = (silu_mul, silu_mul_reference, [normal(50, 300), normal(50, 300)])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", cases())
def test_within_twice_the_error_of_torch(name, dtype):
    op, reference, tensors = cases()[name]
    small = [t.to(dtype) for t in tensors]
    exact = differentiated(reference, [t.double() for t in small])
    torchs = differentiated(reference, small)
    mine = differentiated(op, [t.cuda() for t in small])
    for kind, *found in zip(("output", "gradient"), mine, torchs, exact, strict=True):
        largest = max(float(t[t.isfinite()].abs().amax()) for t in found[2] if t.isfinite().any())
        for i, (a, b, c) in enumerate(zip(*found, strict=True)):
            check_error(f"{str(dtype).removeprefix('torch.')} {kind} {i}", a.cpu(), b, c, largest)


def test_two_runs_are_equal_bit_for_bit():
    for op, _, tensors in cases().values():
        runs = [differentiated(op, [t.float().cuda() for t in tensors]) for _ in range(2)]
        for one, other in zip(*runs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
