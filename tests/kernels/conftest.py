"""How a kernel is compared with its reference: interpreted on a CPU, beside torch in the same precision.

A kernel may be at most twice as far from the float64 result as torch is in the same dtype, and one rounding
more: the rule of FlashAttention's tests (Dao 2023, arXiv 2307.08691). Buffers
are filled with NaN before a kernel writes them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

import memlib_kernels

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*"]

HALVES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every order of the tests."""
    torch.manual_seed(0)


def results(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def differentiated(function: Callable, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all float inputs for output gradients that every precision can hold."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = [y for y in results(function(*leaves)) if y.is_floating_point()]
    noise = torch.Generator().manual_seed(1)
    grads = [torch.randint(-8, 9, y.shape, generator=noise).to(y) / 4 for y in outputs]
    grads = [torch.where(y.isfinite(), g, 0.0) for y, g in zip(outputs, grads, strict=True)]
    learned = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(outputs, learned, grads, allow_unused=True)
    return [y.detach() for y in outputs], [
        torch.zeros_like(t) if g is None else g for t, g in zip(learned, found, strict=True)
    ]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN, or the lowest integer."""

    def filled(make: Callable) -> Callable:
        def make_(*args: object, **kwargs: object) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)

        return make_

    owners = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ]
    patches = [mock.patch.object(owner, name, filled(getattr(owner, name))) for owner, name in owners]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float tensor in another precision, with its strides; between its elements in memory is NaN."""
    if not tensor.is_floating_point():
        return tensor
    once = tensor[tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())]
    reach = 1 + sum((size - 1) * step for size, step in zip(once.shape, once.stride(), strict=True))
    memory = torch.full((max(reach, 0),), torch.nan, dtype=dtype)
    return memory.as_strided(once.shape, once.stride()).copy_(once).expand(tensor.shape)


def check_error(name: str, mine: Tensor, theirs: Tensor, exact: Tensor, largest: float) -> None:
    """Fail if mine is farther from exact than twice theirs and one rounding of `largest`.

    name: of what is compared; its first word is the dtype. largest: of all outputs, or of all gradients:
    where one cancels to zero, its terms were as large.
    """
    assert mine.shape == exact.shape, f"{name}: shape {list(mine.shape)}, not {list(exact.shape)}"
    assert mine.dtype == theirs.dtype, f"{name}: {mine.dtype}, not {theirs.dtype}"
    assert not mine.isnan().any() or exact.isnan().any(), f"{name} has NaN: not all of it was written"
    shut = ~exact.isfinite()
    assert torch.equal(mine[shut].double(), exact[shut]), f"{name}: not the same infinities"
    mine, theirs, exact = (t.double().masked_fill(shut, 0.0) for t in (mine, theirs, exact))
    if exact.numel():
        # In float64 torch itself is the exact result: 1e-10 finds another formula, not another order.
        eps = max(torch.finfo(getattr(torch, name.split()[0])).eps, 1e-10)
        error, torchs = float((mine - exact).abs().max()), float((theirs - exact).abs().max())
        allowed = 2 * torchs + eps * largest + 1e-14
        assert error <= allowed, f"{name}: error {error:.2e}, torch's {torchs:.2e}, allowed {allowed:.2e}"


@pytest.fixture
def within_twice_torch() -> Callable:
    """within_twice_torch(op, reference, inputs): interpreted outputs and gradients against float64.

    theirs: what torch computes in the same precision, the reference by default; block: the side of tiles.
    """

    def within_twice_torch_(
        op: Callable,
        reference: Callable,
        inputs: Sequence[Tensor],
        *,
        dtypes: Sequence[torch.dtype] = HALVES,
        theirs: Callable | None = None,
        block: int = 16,
    ) -> None:
        from memlib_kernels.interpreter import interpreted

        for dtype in dtypes:
            small = [cast(t, dtype) for t in inputs]
            exact = differentiated(reference, [cast(t, torch.float64) for t in small])
            torchs = differentiated(theirs or reference, small)
            with interpreted(block) as record, poisoned():
                mine = differentiated(op, small)
            empty = not any(y.numel() for y in exact[0])
            assert record.launches or empty, "no kernel was launched"
            for kind, *found in zip(("output", "gradient"), mine, torchs, exact, strict=True):
                largest = max(
                    (float(t[t.isfinite()].abs().amax()) for t in found[2] if t.isfinite().any()), default=0
                )
                for i, (a, b, c) in enumerate(zip(*found, strict=True)):
                    check_error(f"{str(dtype).removeprefix('torch.')} {kind} {i}", a, b, c, largest)

    return within_twice_torch_


@pytest.fixture
def passes_gradcheck() -> Callable:
    """passes_gradcheck(op, inputs): in float64, through the interpreted kernels."""

    def passes_gradcheck_(op: Callable, inputs: Sequence[Tensor]) -> None:
        from memlib_kernels.interpreter import interpreted

        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        with interpreted() as record:
            torch.autograd.gradcheck(op, leaves, fast_mode=True)
        assert record.launches

    return passes_gradcheck_


@pytest.fixture
def is_an_operator() -> Callable:
    """is_an_operator(op, args): torch.library.opcheck, one graph under torch.compile, and torch.export.

    op: the registered operator; args: as it takes them, float tensors differentiable.
    """

    def is_an_operator_(op: Callable, args: Sequence[object], gradients: bool = True) -> None:
        from memlib_kernels.interpreter import interpreted

        class Module(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor | Sequence[Tensor]:
                rest = iter(tensors)
                return op(*(next(rest) if isinstance(arg, Tensor) else arg for arg in args))

        tensors = [arg.detach() for arg in args if isinstance(arg, Tensor)]
        with interpreted() as record:
            learning = [
                arg.detach().requires_grad_(gradients and arg.is_floating_point())
                if isinstance(arg, Tensor)
                else arg
                for arg in args
            ]
            torch.library.opcheck(op, learning)
            torch.compiler.reset()
            run = Module().forward
            compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
            if gradients:
                eager, traced = differentiated(run, tensors), differentiated(compiled, tensors)
            else:
                eager, traced = [results(run(*tensors))], [results(compiled(*tensors))]
            assert record.launches
            for one, other in zip(eager, traced, strict=True):
                for a, b in zip(one, other, strict=True):
                    assert torch.equal(a, b), "compiled, the operator gives something else"
            program = torch.export.export(Module(), tuple(tensors))
            assert any(op._opoverload == node.target for node in program.graph.nodes)
            for a, b in zip(results(program.module()(*tensors)), results(run(*tensors)), strict=True):
                assert torch.equal(a, b), "exported, the operator gives something else"

    return is_an_operator_


def load(path: Path, name: str) -> ModuleType:
    """The module of a file, under another name than the package's own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mutated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """mutated("silu_mul_kernel", "silu_mul_forward", old, new): use a wrong kernel for this test.

    In that function of the module, the one occurrence of `old` becomes `new`. Operators import their kernels
    when they run, so that they find the wrong ones.
    """

    def mutated_(name: str, function: str, old: str, new: str) -> ModuleType:
        whole = f"memlib_kernels.{name}"
        module = importlib.import_module(whole)
        source = inspect.getsource(module)
        found = getattr(module, function)
        part = inspect.getsource(getattr(found, "fn", found))
        assert part.count(old) == 1, f"{part.count(old)} times {old!r} in {function}: must be once"
        path = tmp_path / f"{name}_mutant.py"
        path.write_text(source.replace(part, part.replace(old, new)))
        wrong = load(path, f"{name}_mutant")
        monkeypatch.setitem(sys.modules, whole, wrong)
        monkeypatch.setattr(memlib_kernels, name, wrong, raising=False)
        return wrong

    return mutated_
