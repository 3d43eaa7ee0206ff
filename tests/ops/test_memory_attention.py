"""Attention over slots: widths, biases, top-k, and slots that may not be read."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from memlib.ops import memory_attention, memory_attention_reference, memory_attention_weights

SHAPES = [
    (1, 1, 1, 1, 2, 3),
    (2, 3, 5, 7, 4, 4),
    (2, 1, 9, 70, 8, 5),
    (1, 2, 6, 300, 8, 8),
]


def inputs(b, h, n, s, k, e, dtype=torch.float64, heads=True):
    torch.manual_seed(s)
    tensors = [torch.randn(b, h, *x, dtype=dtype) for x in ((n, k), (s, k), (s, e))]
    return tensors if heads else [t[:, 0] for t in tensors]


def bias_of(kind, b, h, n, s):
    torch.manual_seed(s)
    shape = {"slot": (b, s), "token": (b, n, s), "head": (b, h, 1, s), "all": (b, h, n, s)}[kind]
    bias = torch.randn(shape, dtype=torch.float64)
    bias[torch.rand(shape) < 0.3] = -torch.inf
    bias[0] = -torch.inf  # this row may read nothing
    return bias


def both(**options):
    """Operation and reference with the bias as fourth tensor, if there is one."""

    def bind(op):
        return lambda q, keys, values, bias=None: op(q, keys, values, bias=bias, **options)

    return bind(memory_attention), bind(memory_attention_reference)


@pytest.fixture(params=["flash", "dense"], autouse=True)
def path(request, monkeypatch):
    """Every test once by either path, whatever the sizes."""
    module = sys.modules["memlib_kernels.memory_attention"]
    monkeypatch.setattr(module, "FLASH_FROM", 1 if request.param == "flash" else 2**60)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [None, 1, 3, 10**6])
@pytest.mark.parametrize("lse", [False, True])
def test_equals_its_reference(shape, top_k, lse, agrees):
    options = {"top_k": top_k, "return_lse": lse}
    agrees(*both(**options), inputs(*shape))
    agrees(*both(**options, scale=0.7), inputs(*shape, heads=False))


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("kind", ["slot", "token", "head", "all"])
def test_biases_have_gradients_and_may_shut_slots(shape, top_k, kind, agrees):
    b, h, n, s, _, _ = shape
    agrees(*both(top_k=top_k, return_lse=True), [*inputs(*shape), bias_of(kind, b, h, n, s)])
    if kind in ("slot", "token"):
        agrees(*both(top_k=top_k), [*inputs(*shape, heads=False), bias_of(kind, b, h, n, s)])


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_learned_scale_has_a_gradient(top_k, agrees):
    def bind(op):
        return lambda q, keys, values, scale: op(q, keys, values, scale=scale, top_k=top_k)

    agrees(
        bind(memory_attention),
        bind(memory_attention_reference),
        [*inputs(2, 3, 5, 7, 4, 4), torch.tensor(0.7, dtype=torch.float64)],
    )


@pytest.mark.parametrize("top_k", [None, 2])
def test_no_queries_no_slots_no_rows(top_k, agrees):
    for shape in ((2, 3, 0, 7, 4, 4), (2, 3, 5, 0, 4, 4), (0, 3, 5, 7, 4, 4)):
        agrees(*both(top_k=top_k, return_lse=True), inputs(*shape))


def test_a_shut_memory_reads_zero_and_passes_no_gradient():
    for shape in (SHAPES[1], SHAPES[3]):
        q, keys, values = (t.requires_grad_() for t in inputs(*shape))
        bias = torch.full((shape[0], shape[3]), -torch.inf, dtype=torch.float64)
        y, lse = memory_attention(q, keys, values, bias=bias, return_lse=True)
        assert not y.any() and lse.isneginf().all()
        for grad in torch.autograd.grad(y.sum(), (q, keys, values)):
            assert not grad.any()


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_weights_are_those_of_the_read(top_k):
    shape = (2, 3, 5, 40, 4, 6)
    q, keys, values = inputs(*shape)
    for bias in (None, bias_of("slot", *shape[:4])):
        weight = memory_attention_weights(q, keys, bias=bias, top_k=top_k)
        read = memory_attention(q, keys, values, bias=bias, top_k=top_k)
        torch.testing.assert_close(weight @ values, read, atol=1e-12, rtol=1e-12)
        if top_k:
            assert int((weight > 0).sum(-1).max()) <= top_k


@pytest.mark.parametrize(("slots", "top_k"), list(itertools.product((40, 3000), (None, 3))))
def test_half_precision(slots, top_k, near_in_half):
    """Top-k may select other slots in half precision: there all slots but a few are shut."""
    shape = (2, 2, 5, slots, 8, 6)
    bias = torch.zeros(2, slots)
    if top_k:
        bias[:, top_k:] = -torch.inf
    near_in_half(both(top_k=top_k, return_lse=True)[0], [*inputs(*shape), bias], within=32)


def test_gradcheck():
    tensors = [*inputs(1, 2, 3, 4, 2, 3), torch.randn(1, 4, dtype=torch.float64)]
    torch.autograd.gradcheck(both(return_lse=True)[0], [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("slots", [40, 3000])
@pytest.mark.parametrize("top_k", [None, 3])
def test_traces(slots, top_k, traces):
    tensors = [*inputs(2, 2, 5, slots, 8, 6, torch.float32), torch.randn(2, slots)]
    traces(both(top_k=top_k)[0], tensors)


def test_a_slot_that_may_not_be_read_and_is_read_is_noticed(path, agrees, monkeypatch):
    """Mutant: shut slots are read."""
    module = sys.modules["memlib_kernels.memory_attention"]
    read = getattr(module, f"read_{path}")
    monkeypatch.setattr(module, f"read_{path}", lambda q, k, v, bias, lse: read(q, k, v, None, lse))
    with pytest.raises(AssertionError):
        agrees(*both(), [*inputs(*SHAPES[1]), bias_of("slot", *SHAPES[1][:4])])
