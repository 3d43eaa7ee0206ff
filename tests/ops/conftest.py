"""How an operation is compared with its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def results(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def differentiated(function: Callable, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all float inputs for fixed random output gradients."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = results(function(*leaves))
    noise = torch.Generator().manual_seed(1)
    loss = sum(
        (torch.where(y.isfinite(), y, 0.0).double() * torch.randn(y.shape, generator=noise)).sum()
        for y in outputs
        if y.is_floating_point()
    )
    learned = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(loss, learned, allow_unused=True)
    return [y.detach() for y in outputs], [
        torch.zeros_like(t) if g is None else g for t, g in zip(learned, grads, strict=True)
    ]


@pytest.fixture
def agrees():
    """agrees(op, reference, inputs): same outputs and same gradients, and nothing is NaN."""

    def agrees_(op: Callable, reference: Callable, inputs: Sequence[Tensor], atol: float = 1e-10) -> None:
        mine, theirs = differentiated(op, inputs), differentiated(reference, inputs)
        for kind, one, other in zip(("output", "gradient"), mine, theirs, strict=True):
            for i, (a, b) in enumerate(zip(one, other, strict=True)):
                assert a.shape == b.shape and a.dtype == b.dtype, f"{kind} {i}: {a.shape} {a.dtype}"
                assert not a.isnan().any(), f"{kind} {i} has NaN"
                torch.testing.assert_close(
                    a, b, atol=atol, rtol=atol, msg=lambda m, k=kind, i=i: f"{k} {i}: {m}"
                )

    return agrees_


@pytest.fixture
def near_in_half():
    """near_in_half(op, inputs): in bf16 and fp16 finite, and near the float64 result of the same numbers."""

    def near_in_half_(op: Callable, inputs: Sequence[Tensor], within: float = 4.0) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            small = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
            exact = [t.double() if t.is_floating_point() else t for t in small]
            for got, wanted in zip(differentiated(op, small), differentiated(op, exact), strict=True):
                for a, b in zip(got, wanted, strict=True):
                    assert torch.equal(a.isfinite(), b.isfinite()), f"{dtype}: not finite"
                    a, b = (torch.where(t.isfinite(), t, 0.0).double() for t in (a, b))
                    allowed = within * torch.finfo(dtype).eps * max(1.0, float(b.abs().max()))
                    assert float((a - b).abs().max()) <= allowed, f"{dtype}"

    return near_in_half_


@pytest.fixture
def traces():
    """traces(op, inputs): compiled as one graph, and exported, an operation gives its eager results."""

    def traces_(op: Callable, inputs: Sequence[Tensor], atol: float = 1e-5) -> None:
        class Module(torch.nn.Module):
            def forward(self, *args: Tensor) -> Tensor | Sequence[Tensor]:
                return op(*args)

        torch.compiler.reset()
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        eager, traced = differentiated(op, inputs), differentiated(compiled, inputs)
        for one, other in zip(eager, traced, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, atol=atol, rtol=atol)
        plain = [t.detach() for t in inputs]
        exported = torch.export.export(Module(), tuple(plain)).module()
        for a, b in zip(results(exported(*plain)), results(op(*plain)), strict=True):
            torch.testing.assert_close(a, b, atol=atol, rtol=atol)

    return traces_
