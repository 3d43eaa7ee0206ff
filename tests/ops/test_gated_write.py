"""Writes of a whole segment against token-by-token loops."""

from __future__ import annotations

import sys

import pytest
import torch

from memlib.ops import decaying_write, decaying_write_reference, gated_write, gated_write_reference
from memlib_kernels.gated_write import gated_write_traced

SIZES = [(1, 1, 1, 1), (2, 2, 3, 4), (2, 7, 5, 3), (1, 16, 4, 2), (2, 33, 6, 5), (3, 100, 2, 2)]


def inputs(b, n, s, e, hard=True, dtype=torch.float64):
    torch.manual_seed(n)
    erase = torch.rand(b, n, s)
    if hard:
        erase[:, ::5], erase[:, 1::5] = 1.0, 0.0
    return [t.to(dtype) for t in (torch.randn(b, s, e), torch.rand(b, n, s), erase, torch.randn(b, n, e))]


@pytest.mark.parametrize("size", SIZES)
def test_gated_write_equals_its_reference(size, agrees):
    """With erasures of exactly 0 and 1 among them."""
    agrees(gated_write, gated_write_reference, inputs(*size))


@pytest.mark.parametrize("size", SIZES)
def test_the_traced_form_equals_the_reference(size, agrees):
    agrees(gated_write_traced, gated_write_reference, inputs(*size, hard=False), atol=1e-9)


def test_no_tokens_and_no_rows(agrees):
    agrees(gated_write, gated_write_reference, inputs(2, 0, 3, 4))
    agrees(gated_write, gated_write_reference, inputs(0, 3, 3, 4))


def test_gradcheck():
    torch.autograd.gradcheck(gated_write, [t.requires_grad_() for t in inputs(1, 5, 3, 2, hard=False)])


def test_half_precision_is_finite_where_all_is_erased(near_in_half):
    near_in_half(gated_write, inputs(2, 20, 5, 3), within=16)


def test_the_state_keeps_its_dtype():
    slots, strength, erase, values = inputs(2, 5, 3, 4, dtype=torch.bfloat16)
    written = gated_write(slots.float(), strength, erase, values)
    assert written.dtype == torch.float32
    wide = gated_write_reference(*(t.float() for t in (slots, strength, erase, values)))
    torch.testing.assert_close(written, wide)
    assert gated_write(slots, strength, erase, values).dtype == torch.bfloat16


def test_gated_write_traces(traces):
    traces(gated_write, inputs(2, 20, 5, 3, hard=False, dtype=torch.float32), atol=1e-4)


def test_a_token_that_erases_for_itself_is_noticed(agrees, monkeypatch):
    """Mutant: a token's own erasure also shrinks what it writes."""
    module = sys.modules["memlib_kernels.gated_write"]
    whole = module.later_products

    def eager_erasure(remain):
        later, total = whole(remain)
        return later * remain, total

    monkeypatch.setattr(module, "later_products", eager_erasure)
    with pytest.raises(AssertionError, match="output"):
        agrees(gated_write, gated_write_reference, inputs(2, 7, 5, 3))


def decaying_inputs(b=2, n=9, h=3, s=4, e=5, dtype=torch.float64):
    torch.manual_seed(n)
    shapes = torch.randn(b, h, s, e), torch.rand(b, n, h, s), torch.rand(b, n, h)
    return [t.to(dtype) for t in (*shapes, -torch.rand(b, n, h), torch.randn(b, n, e))]


@pytest.mark.parametrize("n", [0, 1, 9, 40])
def test_decaying_write_equals_its_reference(n, agrees):
    agrees(decaying_write, decaying_write_reference, decaying_inputs(n=n))


def test_decaying_write_in_other_modes(traces, near_in_half):
    traces(decaying_write, decaying_inputs(dtype=torch.float32))
    near_in_half(decaying_write, decaying_inputs(), within=16)
    torch.autograd.gradcheck(decaying_write, [t.requires_grad_() for t in decaying_inputs(1, 3, 2, 2, 2)])


@pytest.mark.parametrize("pace", [1.0, 30.0, 3000.0])
def test_fast_decay_keeps_its_digits_in_float32(pace):
    """In float32 as in float64, also where one token leaves nothing of the tokens before it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    given = (
        random(2, 3, 4, 5),
        random(2, 64, 3, 4),
        random(2, 64, 3),
        -pace * random(2, 64, 3),
        random(2, 64, 5),
    )
    want = decaying_write_reference(*given)
    got = decaying_write(*(tensor.float() for tensor in given))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
