"""Normalisation with residual, dropout and activation: its kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib_kernels.interpreter import interpret, interpreted
from memlib_kernels.norm import fused_norm, fused_norm_reference
from memlib_kernels.norm_op import norm_backward_op, norm_op
from memlib_kernels.philox import philox, uniform
from memlib_kernels.rms_norm import rms_norm, rms_norm_reference
from memlib_kernels.tiles import Tile

FEW = settings(max_examples=5, deadline=None, derandomize=True)
FORMS = {
    "rms": {},
    "layer": {"kind": "layer"},
    "rms, silu": {"activation": "silu"},
    "layer, dropout, relu": {"kind": "layer", "dropout": 0.3, "seed": 5, "activation": "relu"},
    "layer, dropout, silu": {"kind": "layer", "dropout": 0.5, "seed": 2**40 + 3, "activation": "silu"},
}


def inputs(*shape, dtype=torch.float64):
    """x, weight, bias, residual."""
    torch.manual_seed(len(shape))
    shapes = shape, shape[-1:], shape[-1:], shape
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def bind(function, **options):
    """function(x, weight, bias, residual), of which the last two may be left out."""

    def call(x, weight, bias=None, residual=None):
        return function(x, weight, bias, residual=residual, **options)

    return call


def compare(within_twice_torch, tensors, **options):
    within_twice_torch(bind(fused_norm, **options), bind(fused_norm_reference, **options), tensors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given_", [2, 3, 4])
def test_within_twice_the_error_of_torch(form, given_, within_twice_torch):
    compare(within_twice_torch, inputs(3, 7, 19)[:given_], **FORMS[form])


@pytest.mark.parametrize("shape", [(1,), (16,), (1, 1), (2, 0, 4), (0, 3), (33, 17)])
def test_shapes(shape, within_twice_torch):
    compare(within_twice_torch, inputs(*shape), kind="layer", dropout=0.2, seed=1)
    within_twice_torch(rms_norm, rms_norm_reference, inputs(*shape)[:2])


def test_strides_and_large_rows(within_twice_torch):
    x, weight, bias, residual = inputs(18, 40)
    compare(within_twice_torch, [x[:, ::2], weight[::2], bias[:20], residual[:, 20:]], kind="layer")
    compare(within_twice_torch, [x.T, weight[:18], bias[:18], residual.T], kind="rms")
    x[0], x[1], residual[:2] = 0.0, x[1] * 1e3, 0.0
    for kind in ("rms", "layer"):
        compare(within_twice_torch, [x, weight, bias, residual], kind=kind)


def test_rows_of_the_backward_pass_are_summed_by_few_programs(within_twice_torch, monkeypatch):
    from memlib_kernels import norm_kernel

    monkeypatch.setattr(norm_kernel, "PROGRAMS", 2)
    compare(within_twice_torch, inputs(75, 18), kind="layer")


def test_a_tile_of_one_row(within_twice_torch, monkeypatch):
    from memlib_kernels import norm_kernel

    monkeypatch.setattr(norm_kernel, "tile", lambda *key: Tile(1, 64))
    compare(within_twice_torch, inputs(5, 40), kind="layer", dropout=0.2, seed=3)


@FEW
@given(n=st.integers(1, 35), d=st.integers(1, 35), form=st.sampled_from(list(FORMS)))
def test_any_shape(n, d, form):
    tensors = inputs(n, d)
    with interpreted():
        found = bind(fused_norm, **FORMS[form])(*tensors)
    torch.testing.assert_close(found, bind(fused_norm_reference, **FORMS[form])(*tensors))


@pytest.mark.parametrize("form", ["rms, silu", "layer, dropout, silu"])
def test_gradients_and_registration(form, passes_gradcheck, is_an_operator):
    passes_gradcheck(bind(fused_norm, **FORMS[form]), inputs(3, 18))
    x, weight, bias, residual = inputs(3, 18, dtype=torch.float32)
    options = ("layer", 0.4, 7, "silu", 1e-6)
    is_an_operator(norm_op, (x, weight, bias, residual, *options))
    is_an_operator(norm_op, (x, weight, None, None, "rms", 0.0, 0, "none", 1e-6))
    backward = (x, residual, x + residual, weight, bias, *options)
    is_an_operator(norm_backward_op, backward, gradients=False)


@pytest.mark.parametrize("form", FORMS)
def test_on_the_cpu_torch_computes_it(form):
    tensors = inputs(3, 7, 19)
    found = bind(fused_norm, **FORMS[form])(*tensors)
    torch.testing.assert_close(found, bind(fused_norm_reference, **FORMS[form])(*tensors))


@triton.jit
def uniform_kernel(Out, seed, first, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(Out + place, tl.rand(seed, first + place.to(tl.int64)))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**63 - 1])
def test_random_numbers_are_those_of_triton(seed):
    found = torch.empty(64)
    interpret(uniform_kernel, (1,), (found, seed, 0), {"BLOCK": 64})
    assert torch.equal(found, uniform(seed, torch.Size([64])))


def test_random_numbers_are_those_of_the_paper_and_uniform():
    assert philox(0, torch.tensor([0])).tolist() == [0x6627E8D5]  # Random123's known answers
    far = torch.empty(16)
    interpret(uniform_kernel, (1,), (far, 3, 2**40), {"BLOCK": 16})
    word = philox(3, 2**40 + torch.arange(16))
    folded = torch.where(word > 2**31 - 1, 2**32 - 1 - word, word)
    torch.testing.assert_close(far, (folded / 2**31).float())
    numbers = uniform(11, torch.Size([100, 1000]))
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    counts = torch.histc(numbers, 10, 0, 1)
    assert float((counts - 1e4).abs().max()) < 5 * 1e4**0.5


def test_dropout_keeps_the_mean_and_another_seed_drops_others():
    x = torch.ones(64, 64)
    weight = torch.ones(64)
    first, again, other = (fused_norm(x, weight, dropout=0.25, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.03
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 4 / 3]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "batch"},
        {"activation": "gelu"},
        {"dropout": 0.1},
        {"dropout": 1.0, "seed": 1},
        {"seed": -1},
        {"bias": torch.ones(3)},
        {"residual": torch.ones(2, 5)},
    ],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        fused_norm(torch.ones(2, 4), torch.ones(4), **wrong)


def compare_strided(within_twice_torch):
    """The comparison that wrong kernels must fail."""
    x, weight, bias, residual = inputs(18, 40)
    tensors = [x[:, :19], weight[:19], bias[:19], residual[:, :19].contiguous()]
    for form in ("layer, dropout, relu", "layer, dropout, silu"):
        compare(within_twice_torch, tensors, **FORMS[form])


def test_the_right_kernel_passes(within_twice_torch, monkeypatch):
    from memlib_kernels import norm_kernel

    monkeypatch.setattr(norm_kernel, "PROGRAMS", 1)
    compare_strided(within_twice_torch)


@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("normalised", "keep_dims=True) / d + eps", "keep_dims=True) + eps"),
        ("normalised", "keep_dims=True) / d + eps", "keep_dims=True) / d + eps * 1e4"),
        ("normalised", "if LAYER:", "if False:"),
        ("normalised", "tl.where(inside, total - ", "tl.where(inside | (d > 0), total - "),
        ("kept", "rows * d + columns", "rows + columns"),
        ("kept", ">= dropout", "<= dropout"),
        ("norm_forward", "y * grow", "y"),
        ("norm_forward", "y <= 0.0", "y <= 0.2"),
        ("norm_forward", "y = u * ", "y = u + "),
        ("norm_forward", "Residual + rows * residual_n", "Residual + rows * x_n"),
        ("norm_forward", "rows < n", "rows < n - 1"),
        ("norm_backward", "dz * grow", "dz"),
        ("norm_backward", "z *= grow", "z *= 1.0"),
        ("norm_backward", "du - u * (tl.sum(du * u, 1, keep_dims=True) / d)", "du"),
        ("norm_backward", "dx -= tl.sum(du, 1, keep_dims=True) / d", "dx -= 0.0"),
        ("norm_backward", "if RESIDUAL:", "if False:"),
        ("norm_backward", "dweight += ", "dweight = "),
        ("norm_backward", "dbias += tl.sum(dz", "dbias += tl.sum(dz * u"),
        ("norm_backward", "(program * tiles + i)", "(program * tiles)"),
    ],
)
def test_wrong_kernels_are_noticed(kernel, old, new, mutated, within_twice_torch):
    mutated("norm_kernel", kernel, old, new).PROGRAMS = 1
    with pytest.raises(AssertionError, match=r"error|NaN|infinities"):
        compare_strided(within_twice_torch)
