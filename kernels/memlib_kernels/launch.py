"""How kernels are started: compiled on a GPU, or by another runner inside a context manager.

A *runner* is a function that takes a kernel, its grid and its arguments. Without one, `launch` compiles the
kernel and starts it on the GPU. `interpreted()` (interpreter.py) installs a runner that executes the kernel's
Python on CPU tensors; `compile_only()` (ahead_of_time.py) one that compiles it and starts nothing. All three
go through the same launch code, so what is tested without a GPU is what runs on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memlib_kernels.tiles import Tile

Grid = tuple[int, ...]

INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Runner:
    """run(kernel, grid, args, constants); target: "sm_90", "gfx942", … or INTERPRETER; tile: that of every
    kernel, or None for the table's."""

    run: Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None]
    target: str
    tile: Tile | None = None


_RUNNER: ContextVar[Runner | None] = ContextVar("memlib_kernels_runner", default=None)


@contextmanager
def using(runner: Runner) -> Iterator[None]:
    """Start all kernels by `runner` inside this block."""
    token = _RUNNER.set(runner)
    try:
        yield
    finally:
        _RUNNER.reset(token)


def runner() -> Runner | None:
    return _RUNNER.get()


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors starts Triton kernels.

    On a GPU (CUDA or ROCm) in float16, bfloat16 or float32; anywhere inside `interpreted()` and
    `compile_only()`. Otherwise torch computes it. What torch.compile and torch.export trace depends on the
    device alone.
    """
    if not torch.compiler.is_compiling() and _RUNNER.get() is not None:
        return True
    return all(t is None or (t.is_cuda and t.dtype != torch.float64) for t in tensors)


def launch(kernel: Any, grid: Grid, *args: Any, **constants: Any) -> None:
    """Start a kernel. constants: its `tl.constexpr` arguments, and `num_warps` and `num_stages`."""
    if 0 in grid:
        return
    found = _RUNNER.get()
    if found is None:
        kernel[grid](*args, **constants)
    else:
        found.run(kernel, grid, args, constants)


def target() -> str:
    """What the current launch is compiled for: "sm_90", "gfx942", …, or INTERPRETER."""
    found = _RUNNER.get()
    if found is not None:
        return found.target
    if not torch.cuda.is_available():
        raise RuntimeError(
            "kernels start on a GPU, and there is none: run the call, and its backward pass, inside "
            "`with memlib_kernels.interpreter.interpreted():`"
        )
    if torch.version.hip:
        return str(torch.cuda.get_device_properties().gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
