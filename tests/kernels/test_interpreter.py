"""The interpreter: what it computes, what it records, and that it leaves nothing behind.

It builds on private names of Triton 3.7.1. If these tests fail after an upgrade, compare
`memlib_kernels/interpreter.py` with the release's `triton/runtime/interpreter.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from memlib_kernels import launch
from memlib_kernels.attention import flash_attention
from memlib_kernels.interpreter import Record, interpreted, rounded


@triton.jit
def plus_one(x):
    return x + 1.0


@triton.jit
def add_one(X, Y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0)
    tl.store(Y + at, plus_one(x), mask=at < count)


@triton.jit
def square(X, Y, BLOCK: tl.constexpr, ACC: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at[:, None] * BLOCK + at[None, :])
    y = tl.dot(x, x, out_dtype=ACC)
    tl.store(Y + at[:, None] * BLOCK + at[None, :], y.to(Y.dtype.element_ty))


@triton.jit
def out_of_bounds(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + 1 + at))


def run(kernel, *args, programs=1, record=False, **constants) -> Record:
    with interpreted(record=record) as found:
        launch.launch(kernel, (programs,), *args, **constants)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_that_call_kernels(dtype):
    x = torch.randn(20).to(dtype)
    y = torch.full_like(x, torch.nan)
    run(add_one, x, y, 20, programs=2, BLOCK=16)
    assert torch.equal(y, x + 1)


def test_bfloat16_rounds_to_nearest_even():
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (5000,), dtype=torch.int64).to(torch.int32)
    x = torch.cat(
        (bits.view(torch.float32), torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3e38]))
    )
    mine = torch.from_numpy(rounded(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(mine.nan_to_num(7.0), x.to(torch.bfloat16).nan_to_num(7.0))


def test_products_of_bfloat16_are_those_of_the_widened_numbers():
    x = torch.randn(16, 16).to(torch.bfloat16)
    y = torch.empty(16, 16)
    run(square, x, y, BLOCK=16, ACC=tl.float32)
    torch.testing.assert_close(y, x.float() @ x.float())
    half = torch.empty_like(x)
    run(square, x, half, BLOCK=16, ACC=tl.float32)
    assert torch.equal(half, y.to(torch.bfloat16))


def test_the_record_of_a_launch():
    x, y = torch.randn(20), torch.empty(20)
    record = run(add_one, x, y, 20, programs=2, record=True, BLOCK=16)
    assert record.launches == [("add_one", (2,))]
    assert [(a.program, a.kind, a.tensor, int(a.mask.sum())) for a in record.accesses] == [
        ((0, 0, 0), "load", "X", 16),
        ((0, 0, 0), "store", "Y", 16),
        ((1, 0, 0), "load", "X", 4),
        ((1, 0, 0), "store", "Y", 4),
    ]
    assert record.bytes("load") == record.bytes("store") == 80
    assert record.unique_bytes("load") == 80 and record.flops() == 0
    with open(__file__) as file:
        lines = file.read().splitlines()
    assert [lines[a.line - 1].strip().split("(")[0] for a in record.accesses[:2]] == [
        "x = tl.load",
        "tl.store",
    ]
    assert not record.written_twice()
    record = run(square, torch.randn(16, 16), torch.empty(16, 16), record=True, BLOCK=16, ACC=tl.float32)
    assert record.flops() == 2 * 16**3


def test_a_race_is_seen_in_the_record():
    x, y = torch.randn(16, 16), torch.empty(16, 16)
    record = run(square, x, y, programs=2, record=True, BLOCK=16, ACC=tl.float32)
    assert record.written_twice() == [("square", "Y")]


def test_an_access_outside_a_tensor_is_an_error_when_recorded():
    x, y = torch.randn(16), torch.empty(16)
    with pytest.raises(IndexError, match="a load at offset 16 of X, which has 16 elements"):
        run(out_of_bounds, x, y, record=True, BLOCK=16)


def test_an_argument_that_is_missing_is_named():
    with pytest.raises(TypeError, match="add_one is launched without count, BLOCK"):
        run(add_one, torch.randn(4), torch.empty(4))


def test_nothing_is_left_behind():
    before = tl.sum, tl.load, tl.tensor.__add__, type(add_one).__call__
    q = torch.randn(1, 1, 4, 16)
    with interpreted() as record, pytest.raises(ZeroDivisionError):
        flash_attention(q, q, q)
        raise ZeroDivisionError
    assert record.launches
    assert before == (tl.sum, tl.load, tl.tensor.__add__, type(add_one).__call__)
    assert launch.runner() is None and not launch.runs_triton(q)
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        add_one(1, 2, 3, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own message")
def test_a_backward_pass_after_the_block_names_the_remedy():
    q = torch.randn(1, 1, 4, 16, requires_grad=True)
    with interpreted():
        out, _ = flash_attention(q, q, q)
    with pytest.raises(RuntimeError, match="inside `with memlib_kernels"):
        out.sum().backward()


def test_the_release_that_is_built_on():
    assert triton.__version__ == "3.7.1"
