"""Attention over slots: the interpreted kernels against float64, with places, shared slots and biases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib_kernels.attention_op import attention_op
from memlib_kernels.interpreter import interpreted
from memlib_kernels.memory_attention import memory_attention, memory_attention_reference

FEW = settings(max_examples=6, deadline=None, derandomize=True)


def inputs(b, h, n, s, k, e, dtype=torch.float64):
    torch.manual_seed(n + s + k)
    return [
        torch.randn(b, h, n, k, dtype=dtype),
        torch.randn(b, h, s, k, dtype=dtype),
        torch.randn(b, h, s, e, dtype=dtype),
    ]


def reading(**options):
    """The operation and its reference, with a bias as a fourth tensor if there is one."""

    def with_options(function):
        return lambda q, k, v, *bias: function(
            q, k, v, bias=bias[0] if bias else None, return_lse=True, **options
        )

    return with_options(memory_attention), with_options(memory_attention_reference)


@pytest.fixture
def agrees(within_twice_torch):
    """agrees((op, reference), inputs): against float64, beside the CPU path."""

    def agrees_(pair, inputs, **options):
        within_twice_torch(*pair, inputs, theirs=pair[0], **options)

    return agrees_


BIASES = {"of a slot": (2, 33), "of a slot and head": (2, 3, 1, 33), "of a pair": (2, 19, 33)}


@pytest.mark.parametrize("name", BIASES)
def test_biases_and_their_gradients(name, agrees):
    bias = torch.randn(BIASES[name], dtype=torch.float64)
    bias[..., 4] = -torch.inf
    finite = [*inputs(2, 3, 19, 33, 16, 24), bias.masked_fill(bias.isinf(), 1.0)]
    agrees(reading(), finite)
    shut = reading()
    fixed = tuple(lambda *x, f=f: f(*x, bias.to(x[0].dtype)) for f in shut)
    agrees(fixed, inputs(2, 3, 19, 33, 16, 24), dtypes=[torch.float32])


@pytest.mark.parametrize("groups", [1, 4, 20])
def test_places_of_a_group_of_queries(groups, agrees):
    places = torch.randint(-1, 33, (2, groups, 7), generator=torch.Generator().manual_seed(groups))
    places[0, 0] = -1  # this group may read nothing
    places[1, 0, :2] = 5  # a slot that is listed twice counts twice
    bias = torch.randn(2, 33, dtype=torch.float64)
    agrees(reading(places=places), [*inputs(2, 2, 20, 33, 16, 24), bias])


def test_places_of_each_head(agrees):
    places = torch.randint(0, 33, (1, 2, 5, 6), generator=torch.Generator().manual_seed(0))
    agrees(reading(places=places), inputs(2, 2, 20, 33, 16, 16), dtypes=[torch.float32, torch.bfloat16])


def test_top_k_reads_the_same_slots(agrees):
    agrees(reading(top_k=5), inputs(1, 2, 19, 33, 16, 16), dtypes=[torch.float32])


def test_no_copies_of_the_slots_that_places_list():
    q, k, v = inputs(1, 1, 32, 64, 16, 16, torch.float32)
    places = torch.arange(16).expand(1, 2, 16)
    with interpreted(record=True) as record:
        memory_attention(q, k, v, places=places)
    loads = [access for access in record.accesses if access.kind == "load" and access.tensor == "K"]
    assert {access.offsets.max() for access in loads} == {16 * 16 - 1}
    assert sum(access.bytes for access in loads) == 2 * 16 * 16 * 4  # once for each group


def test_slots_without_a_batch_axis():
    q, keys, values = inputs(3, 2, 9, 20, 16, 16, torch.float32)
    leaves = [q, keys[0].clone().requires_grad_(), values[0].clone().requires_grad_()]
    whole = [q, *(t.detach().expand(3, 2, 20, 16).clone().requires_grad_() for t in leaves[1:])]
    for kernels in (False, True):
        if kernels:
            with interpreted():
                shared, copied = memory_attention(*leaves), memory_attention(*whole)
                grads = [torch.autograd.grad(y.sum(), x[1:]) for y, x in ((shared, leaves), (copied, whole))]
        else:
            shared, copied = memory_attention(*leaves), memory_attention(*whole)
            grads = [torch.autograd.grad(y.sum(), x[1:]) for y, x in ((shared, leaves), (copied, whole))]
        torch.testing.assert_close(shared, copied)
        torch.testing.assert_close(grads[0], tuple(g.sum(0) for g in grads[1]))
    with interpreted(record=True) as record:
        memory_attention(q, keys[0], values[0])
    assert record.sizes[0, "K"] == 3 * 2 * 20 * 16  # seen as a batch,
    reach = max(a.offsets[a.mask].max() for a in record.accesses if a.tensor == "K")
    assert reach < 2 * 20 * 16  # but stored once


def written_twice(places):
    tensors = [t.requires_grad_() for t in inputs(1, 1, 20, 33, 16, 16, torch.float32)]
    bias = torch.zeros(1, 33, requires_grad=True)
    with interpreted(record=True) as record:
        y, lse = memory_attention(*tensors, bias=bias, places=places, return_lse=True)
        torch.autograd.grad(y.sum() + lse.sum(), (*tensors, bias))
    return record.written_twice()


def test_no_two_programs_write_the_same_element(mutated):
    places = torch.randint(-1, 33, (1, 4, 7), generator=torch.Generator().manual_seed(0))
    assert not written_twice(None) and not written_twice(places)
    mutated("attention_kernel", "attention_forward", "(rows < (which + 1) * group)", "(rows < n)")
    assert written_twice(places) == [("attention_forward", "Out"), ("attention_forward", "Lse")]


@FEW
@given(
    n=st.integers(1, 34),
    s=st.integers(1, 34),
    k=st.sampled_from([16, 20]),
    e=st.sampled_from([16, 33]),
    masked=st.booleans(),
)
def test_any_shape(n, s, k, e, masked):
    tensors = inputs(1, 1, n, s, k, e, torch.float32)
    bias = torch.zeros(1, s)
    if masked:
        bias[0, :: max(2, s // 3)] = -torch.inf
    with interpreted():
        found = memory_attention(*tensors, bias=bias, return_lse=True)
    exact = memory_attention_reference(*(t.double() for t in tensors), bias=bias, return_lse=True)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_empty_banks_and_no_queries():
    for n, s in ((3, 0), (0, 3)):
        q, k, v = inputs(2, 1, n, s, 16, 16, torch.float32)
        with interpreted():
            y, lse = memory_attention(q, k, v, return_lse=True)
        assert y.shape == (2, 1, n, 16) and not y.any()
        assert torch.equal(lse, torch.full((2, 1, n), -torch.inf))


def test_gradients_and_registration(passes_gradcheck, is_an_operator):
    places = torch.tensor([[[0, 3, 3], [-1, 1, 2]]])
    q, k, v = inputs(1, 1, 4, 5, 16, 16)
    op, _ = reading(places=places)
    passes_gradcheck(op, [q, k, v, torch.randn(1, 5, dtype=torch.float64)])
    passes_gradcheck(reading()[0], [q, k, v, torch.randn(1, 4, 5, dtype=torch.float64)])
    single = [t.float() for t in (q, k, v)]
    is_an_operator(attention_op, (*single, None, None, places[None], False, 0, 0.25))


def test_bad_places_are_refused():
    q, k, v = inputs(1, 1, 6, 5, 16, 16)
    with pytest.raises(ValueError, match="u groups divide 6 queries"):
        memory_attention(q, k, v, places=torch.zeros(1, 4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be integers"):
        memory_attention(q, k, v, places=torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="not together with top_k"):
        memory_attention(q, k, v, places=torch.zeros(1, 2, 2, dtype=torch.int64), top_k=2)


SLOTS, KEYS = "attention_backward_slots", "attention_backward_keys"
MUTANTS = {
    "bias ignored": ("masked_scores", "score += tl.load(Bias", "score += 0.0 * tl.load(Bias"),
    "bias of slot 0": ("masked_scores", "keys.to(tl.int64) * bias_m, mask=inside", "0 * keys, mask=inside"),
    "no gradient of the bias": (KEYS, "0.0, dbias) + tl.sum(ds, 1)", "0.0, dbias)"),
    "another slot read": ("attention_forward", "tl.load(Places + keys", "tl.load(Places + 0 * keys"),
    "empty places read": ("attention_forward", "inside = keys >= 0", "inside = keys >= -1"),
    "first group only": (SLOTS, "begin + entry // group", "begin + 0 * entry"),
    "slots' bias ignored": (SLOTS, "* scale + bias - lse", "* scale - lse"),
    "slots' delta ignored": (SLOTS, "tl.sum(dout * v[None, :], 1) - delta", "tl.sum(dout * v[None, :], 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_noticed(name, mutated, agrees):
    mutated("attention_kernel", *MUTANTS[name])
    places = torch.randint(-1, 33, (1, 4, 7), generator=torch.Generator().manual_seed(0))
    tensors = [*inputs(1, 1, 20, 33, 16, 24), torch.randn(1, 33, dtype=torch.float64)]
    with pytest.raises(AssertionError, match=r"error|NaN|infinities"):
        agrees(reading(), tensors, dtypes=[torch.float32])
        agrees(reading(places=places), tensors, dtypes=[torch.float32])
