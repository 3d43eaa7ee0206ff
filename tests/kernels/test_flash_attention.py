"""Attention: the interpreted kernels against float64, on every way to leave keys out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib_kernels.attention import (
    attention,
    attention_with_lse,
    attention_with_lse_reference,
    flash_attention,
    flash_attention_reference,
)
from memlib_kernels.attention_op import attention_backward_op, attention_op
from memlib_kernels.interpreter import interpreted

FEW = settings(max_examples=8, deadline=None, derandomize=True)


def inputs(b, h, g, n, m, k, e, dtype=torch.float64):
    torch.manual_seed(n + m + k)
    return [
        torch.randn(b, h, n, k, dtype=dtype),
        torch.randn(b, g, m, k, dtype=dtype),
        torch.randn(b, g, m, e, dtype=dtype),
    ]


def flash(**options):
    return lambda *x: flash_attention(*x, **options), lambda *x: flash_attention_reference(*x, **options)


@pytest.fixture
def agrees(within_twice_torch):
    """agrees((op, reference), inputs): against float64, beside torch's own flash attention on the CPU."""

    def agrees_(pair, inputs, **options):
        within_twice_torch(*pair, inputs, theirs=pair[0], **options)

    return agrees_


CASES = {
    "one query": ((2, 1, 1, 1, 37, 16, 16), {"causal": True}),
    "ragged": ((1, 2, 2, 19, 37, 20, 20), {"causal": True}),
    "more queries than keys": ((1, 1, 1, 37, 19, 16, 16), {"causal": True}),
    "grouped queries": ((1, 4, 2, 20, 20, 16, 16), {"causal": True}),
    "window": ((1, 1, 1, 40, 40, 16, 16), {"causal": True, "window": 7}),
    "window of one": ((1, 1, 1, 18, 18, 16, 16), {"causal": True, "window": 1}),
    "window over the past": ((1, 1, 1, 5, 40, 16, 16), {"window": 20}),
    "unequal widths": ((1, 1, 1, 18, 33, 16, 40), {}),
    "own scale": ((1, 1, 1, 18, 18, 16, 16), {"causal": True, "scale": 0.7}),
}


@pytest.mark.parametrize("name", CASES)
def test_within_twice_the_error_of_torch(name, agrees):
    shape, options = CASES[name]
    agrees(flash(**options), inputs(*shape))


def test_one_query_and_one_key():
    q, k, v = (t.requires_grad_() for t in inputs(1, 1, 1, 1, 1, 16, 16, torch.float32))
    with interpreted():
        out, lse = flash_attention(q, k, v)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(out, v, rtol=0, atol=0)
    torch.testing.assert_close(lse, (q * k).sum(-1) / 4)
    zero = torch.zeros_like(q)  # the weight of a single key is 1, whatever the score
    torch.testing.assert_close(grads, (zero, zero, torch.ones_like(v)), atol=2e-6, rtol=0)


def test_padding_and_rows_without_keys(agrees):
    valid = torch.rand(2, 37, generator=torch.Generator().manual_seed(0)) > 0.3
    valid[0] = False
    agrees(flash(causal=True, valid=valid), inputs(2, 2, 1, 21, 37, 16, 16))
    with interpreted():
        out, lse = flash_attention(*inputs(2, 2, 1, 21, 37, 16, 16), valid=valid)
    assert not out[0].any() and torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))


def test_strides_and_large_scores(agrees):
    def strided(joined):
        q, k, v = joined.unbind(-2)  # [b n h 3 k] -> [b n h k], the last axis not contiguous below
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    torch.manual_seed(0)
    joined = torch.randn(1, 20, 2, 3, 16, dtype=torch.float64)
    apart = torch.randn(1, 20, 2, 16, 3, dtype=torch.float64).transpose(-1, -2)
    op, reference = flash(causal=True)
    for qkv in (joined, apart):
        pair = (lambda x: op(*strided(x)), lambda x: reference(*strided(x)))
        agrees(pair, [qkv], dtypes=[torch.float32])
    q, k, v = inputs(1, 1, 1, 18, 18, 16, 16)
    agrees((op, reference), [60 * q, 60 * k, v], dtypes=[torch.float32])


def test_tiles_that_do_not_fit_the_width_and_larger_ones(agrees):
    agrees(flash(causal=True), inputs(1, 1, 1, 40, 40, 72, 72), block=32)


@FEW
@given(
    n=st.integers(1, 35),
    m=st.integers(1, 35),
    k=st.sampled_from([16, 17, 32]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    masked=st.booleans(),
)
def test_any_shape(n, m, k, causal, window, masked):
    q, key, v = inputs(1, 1, 1, n, m, k, k, torch.float32)
    valid = torch.rand(1, m, generator=torch.Generator().manual_seed(n)) > 0.4 if masked else None
    options = {"causal": causal, "window": window, "valid": valid}
    with interpreted():
        found = flash_attention(q, key, v, **options)
    for a, b in zip(
        found, flash_attention_reference(q.double(), key.double(), v.double(), **options), strict=True
    ):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_gradients_and_registration(passes_gradcheck, is_an_operator):
    op, _ = flash(causal=True)
    passes_gradcheck(op, inputs(1, 2, 1, 5, 7, 16, 16))
    q, k, v = inputs(2, 2, 1, 9, 11, 16, 16, torch.float32)
    valid, bias = torch.ones(2, 11, dtype=torch.uint8), torch.randn(2, 1, 1, 11)
    is_an_operator(attention_op, (q, k, v, bias, valid, None, True, 0, 0.25))
    with interpreted():
        out, lse = attention_op(q, k, v, bias, valid, None, True, 0, 0.25)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    rest = (q, k, v, out, lse, bias, valid, None, True, 0, 0.25, True)
    is_an_operator(attention_backward_op, (*grads, *rest), gradients=False)


def test_vmap_joins_the_batch():
    q, k, v = inputs(6, 2, 2, 9, 11, 16, 16, torch.float32)
    with interpreted():
        whole = attention_op(q, k, v[:2].repeat(3, 1, 1, 1), None, None, None, False, 0, 0.25)
        mapped = torch.vmap(attention_op, in_dims=(0, 1, None) + (None,) * 6)(
            q.unflatten(0, (3, 2)),
            k.unflatten(0, (3, 2)).transpose(0, 1),
            v[:2], None, None, None, False, 0, 0.25,
        )  # fmt: skip
    for one, other in zip(mapped, whole, strict=True):
        assert torch.equal(one.flatten(0, 1), other)


def test_two_runs_are_equal_bit_for_bit():
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 1, 20, 37, 16, 16, torch.float32))
    runs = []
    for _ in range(2):
        with interpreted():
            out, lse = flash_attention(q, k, v, causal=True)
            runs.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


MASKS = {
    "bias per pair": torch.randn(2, 3, 19, 37, generator=torch.Generator().manual_seed(0)),
    "bias of all heads and rows": torch.randn(19, 37, generator=torch.Generator().manual_seed(1)),
    "bias per key": torch.randn(2, 1, 1, 37, generator=torch.Generator().manual_seed(2)),
    "mask": torch.rand(2, 1, 19, 37, generator=torch.Generator().manual_seed(3)) > 0.3,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_biases_of_attention(name, within_twice_torch):
    mask = MASKS[name]
    q, k, v = inputs(2, 3, 3, 19, 37, 16, 16)
    tensors = [q, k, v, mask] if mask.is_floating_point() else [q, k, v]
    given_ = (lambda *x: x) if mask.is_floating_point() else (lambda *x: (*x, mask))
    dtypes = [torch.float32, torch.bfloat16]

    def reference(*x):
        q, k, v, mask = given_(*x)
        return attention_with_lse_reference(q, k, v, mask)

    within_twice_torch(lambda *x: attention_with_lse(*given_(*x)), reference, tensors, dtypes=dtypes)


def test_attention_begins_its_causal_mask_at_the_first_key():
    q, k, v = inputs(1, 1, 1, 5, 9, 16, 16, torch.float32)
    with interpreted() as record:
        mine = attention(q, k, v, causal=True)
    assert record.launches
    torch.testing.assert_close(
        mine, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_the_cpu_torch_computes_it(dtype):
    valid = torch.rand(2, 37, generator=torch.Generator().manual_seed(0)) > 0.3
    for options in ({}, {"causal": True}, {"window": 5}, {"causal": True, "window": 9, "valid": valid}):
        q, k, v = inputs(2, 4, 2, 21, 37, 16, 16, dtype)
        mine = flash_attention(q, k, v, **options)
        exact = flash_attention_reference(q.double(), k.double(), v.double(), **options)
        for a, b in zip(mine, exact, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    q, k, v = inputs(1, 2, 2, 20, 20, 16, 16, dtype)
    torch.testing.assert_close(
        flash_attention(q, k, v, causal=True)[0],
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


def test_bad_arguments_are_refused():
    q, k, v = inputs(2, 3, 2, 5, 7, 16, 16)
    with pytest.raises(ValueError, match="2 key heads must divide 3 query heads"):
        flash_attention(q, k, v)
    q, k, v = inputs(2, 2, 2, 5, 7, 16, 16)
    with pytest.raises(ValueError, match="window = 0: at least 1"):
        flash_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"valid \[2, 5\]: must be \[b m\], here \[2, 7\]"):
        flash_attention(q, k, v, valid=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="one width"):
        flash_attention(q[..., :8], k, v)
    with pytest.raises(ValueError, match="one batch size"):
        flash_attention(q[:1], k, v)


FORWARD, QUERIES, KEYS = "attention_forward", "attention_backward_queries", "attention_backward_keys"
MUTANTS = {
    "causal mask off by one": ("masked_scores", "keys <= last", "keys < last"),
    "causal mask from the first key": ("masked_scores", "last = rows + (m - n)", "last = rows"),
    "window off by one": ("masked_scores", "> last - WINDOW", ">= last - WINDOW"),
    "padding ignored": ("masked_scores", "(valid != 0)", "(valid >= 0)"),
    "no key mask": ("masked_scores", "allowed = inside", "allowed = keys >= 0"),
    "last keys skipped": ("key_range", "start + BLOCK_N + (m - n)", "start + (m - n)"),
    "sum not scaled down": (FORWARD, "total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    "output not scaled down": (FORWARD, "mixed * shrink[:, None]", "mixed"),
    "wrong key head": (FORWARD, "V += b * v_b + h // per_key_head * v_h", "V += b * v_b"),
    "lse without the maximum": (FORWARD, "top + tl.log(", "tl.log("),
    "no delta": (QUERIES, "tl.sum(out.to(ACC) * dout.to(ACC), 1) - tl.load", "-tl.load"),
    "no gradient of lse": (QUERIES, " - tl.load(DLse + at, mask=inside_rows, other=0.0)", ""),
    "dq without scale": (QUERIES, "dq * scale, rows", "dq, rows"),
    "dk without scale": (KEYS, "dk * scale, keys", "dk, keys"),
    "first queries skipped": (KEYS, "// BLOCK_N * BLOCK_N", "// BLOCK_N * BLOCK_N + BLOCK_N"),
    "window's last queries skipped": (KEYS, "first + BLOCK_M - 1 + WINDOW", "first + WINDOW"),
    "first head only": (KEYS, "range(per_key_head * tiles)", "range(tiles)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_noticed(name, mutated, agrees):
    mutated("attention_kernel", *MUTANTS[name])
    valid = torch.ones(1, 37, dtype=torch.bool)
    valid[0, 3] = False
    shape = inputs(1, 4, 2, 35, 37, 16, 16)
    with pytest.raises(AssertionError, match=r"error|NaN|infinities"):
        agrees(flash(causal=True, window=21, valid=valid), shape, dtypes=[torch.float32])
        agrees(flash(), shape, dtypes=[torch.float32])


def test_wide_float32_products_take_every_chunk(agrees, mutated):
    shape = inputs(1, 1, 1, 18, 19, 144, 200)
    agrees(flash(causal=True), shape)
    mutated("attention_kernel", "product", "range(0, BLOCK, CHUNK)", "range(0, CHUNK, CHUNK)")
    with pytest.raises(AssertionError, match="error"):
        agrees(flash(causal=True), shape, dtypes=[torch.float32])
    agrees(flash(causal=True), shape, dtypes=[torch.bfloat16])  # one product, no chunks
