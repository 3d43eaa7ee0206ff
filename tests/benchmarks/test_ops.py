"""Each operation against its reference: processor time of one thread, in turns in one run, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memlib import ops


def turns(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time of each call."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            spent[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(times) for name, times in spent.items()}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape).mul_(0.05).requires_grad_()


def naive_search(score: Tensor, serial: Tensor) -> Tensor:
    return ops.exact_search_reference(score, serial, 32)


def cases() -> dict[str, tuple[Callable, Callable, list[Tensor], float]]:
    """Name -> operation, reference, inputs, and the most that its time may be as a multiple."""
    torch.manual_seed(0)
    window = [normal(4, 8, 256, 64) for _ in range(3)]
    found: dict[str, tuple[Callable, Callable, list[Tensor], float]] = {
        "attention_with_lse 4x8x256x64": (
            lambda *x: ops.attention_with_lse(*x, causal=True),
            lambda *x: ops.attention_with_lse_reference(*x, causal=True),
            window,
            1.0,
        ),
        "rms_norm 4x256x128": (ops.rms_norm, ops.rms_norm_reference, [normal(4, 256, 128), normal(128)], 1.1),
    }
    for sources in (2, 4):
        found[f"mix {sources} sources 4x256x128"] = (
            lambda w, *x: ops.mix(w, x),
            lambda w, *x: ops.mix_reference(w, x),
            [positive(4, 256, sources), *(normal(4, 256, 128) for _ in range(sources))],
            0.6,
        )
    for slots in (512, 4096):
        ltm = [normal(4, 256, 32), normal(4, slots, 32), normal(4, slots, 32)]
        for top_k in (None, 16):
            found[f"memory_attention {slots} slots of 32, top_k {top_k}"] = (
                lambda *x, k=top_k: ops.memory_attention(*x, top_k=k),
                lambda *x, k=top_k: ops.memory_attention_reference(*x, top_k=k),
                ltm,
                1.1,
            )
        heads = [normal(4, 8, 256, 64), normal(4, 8, slots, 64), normal(4, 8, slots, 64)]
        found[f"memory_attention 8 heads, {slots} slots of 64"] = (
            ops.memory_attention,
            ops.memory_attention_reference,
            heads,
            1.0,
        )
        table = torch.nn.functional.normalize(torch.randn(4, slots // 4, 32), dim=-1).requires_grad_()
        read = [normal(4, 256, 4, 32), table, torch.tensor(4.0, requires_grad=True)]
        found[f"addressed_read {slots} slots of 128"] = (
            ops.addressed_read,
            ops.addressed_read_reference,
            [*read, normal(4, 4, slots // 4, 128)],
            1.1,
        )
    ring = [normal(4, 256, 256), normal(4, 1024, 256), normal(4, 1024, 256), normal(4, 1024)]
    found["memory_attention 1024 slots of 256, learned bias"] = (
        lambda q, k, v, b: ops.memory_attention(q, k, v, bias=b),
        lambda q, k, v, b: ops.memory_attention_reference(q, k, v, bias=b),
        ring,
        1.1,
    )
    for slots, width in ((64, 128), (512, 64), (1024, 512)):
        found[f"gated_write {slots} slots of {width}"] = (
            ops.gated_write,
            by_logarithms(),
            [
                normal(4, slots, width),
                positive(4, 256, slots),
                positive(4, 256, slots),
                normal(4, 256, width),
            ],
            1.25,
        )
    banks = [normal(4, 4, 64, 64), positive(4, 256, 4, 64), positive(4, 256, 4)]
    found["decaying_write 4 banks of 64 x 64"] = (
        ops.decaying_write,
        einsum_decaying,
        [*banks, (-torch.rand(4, 256, 4)).requires_grad_(), normal(4, 256, 64)],
        1.2,
    )
    index = torch.rand(4, 4, 256, 1024).topk(32, -1).indices
    table = normal(4, 4, 1024, 32)
    found["selected_scores 32 of 1024"] = (
        lambda q, t: ops.selected_scores(q, t, index),
        lambda q, t: ops.selected_scores_reference(q, t, index),
        [normal(4, 4, 256, 32), table],
        0.8,
    )
    found["selected_sum 32 of 1024"] = (
        lambda w, t: ops.selected_sum(w, t, index),
        lambda w, t: ops.selected_sum_reference(w, t, index),
        [positive(4, 4, 256, 32), table],
        0.8,
    )
    for c in (256, 1024, 4096):
        score, serial = torch.randn(4, 4, 256, c), torch.arange(c).repeat(4, 1)
        found[f"exact_search 32 of {c}"] = (
            lambda s, at=serial: ops.exact_search(s, at, 32),
            lambda s, at=serial: naive_search(s, at),
            [score],
            1.0,
        )
        query = torch.nn.functional.normalize(torch.randn(4, 4, 256, 32), dim=-1)
        keys = torch.nn.functional.normalize(torch.randn(4, 4, c, 32), dim=-1)
        found[f"nearest 32 of {c}"] = (
            lambda q, k, at=serial: ops.nearest(q, k, at, 32),
            lambda q, k, at=serial: ops.nearest_reference(q, k, at, 32),
            [query, keys],
            1.0,
        )
    return found


def by_logarithms() -> Callable:
    """The gated write by sums of logarithms, the form that compilers trace."""
    from memlib_kernels.gated_write import gated_write_traced

    return gated_write_traced


def einsum_decaying(
    slots: Tensor, address: Tensor, strength: Tensor, log_decay: Tensor, values: Tensor
) -> Tensor:
    """The decaying write as one einsum of three tensors."""
    total = log_decay.sum(1, keepdim=True)
    later = torch.exp(total - log_decay.cumsum(1))
    new = torch.einsum("bnhs,bnh,bne->bhse", address, strength * later, values)
    return slots * torch.exp(total).transpose(1, 2)[..., None] + new


def forward_backward(function: Callable, inputs: list[Tensor]) -> None:
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    learned = [t for t in inputs if t.requires_grad]
    if learned:
        torch.autograd.grad(sum(y.sum() for y in outputs), learned)


NOISE = 1.3  # medians of five on a busy machine


@pytest.mark.slow
def test_operations_are_not_slower_than_their_references():
    slow = []
    print(f"\n{'forward, forward + backward: CPU-ms of the operation, of the reference, ratio':>80}")
    for name, (op, reference, inputs, most) in cases().items():
        with torch.no_grad():
            forward = turns(
                {"op": lambda o=op, i=inputs: o(*i), "ref": lambda r=reference, i=inputs: r(*i)}, 5
            )
        both = turns(
            {
                "op": lambda o=op, i=inputs: forward_backward(o, i),
                "ref": lambda r=reference, i=inputs: forward_backward(r, i),
            },
            5,
        )
        ratio = both["op"] / both["ref"]
        print(
            f"{name:50} {forward['op']:8.2f} {forward['ref']:8.2f} {forward['op'] / forward['ref']:5.2f}"
            f"   {both['op']:8.2f} {both['ref']:8.2f} {ratio:5.2f}"
        )
        if ratio > NOISE * most:
            slow.append(f"{name}: {ratio:.2f} of the reference, at most {most} on a quiet machine")
    assert not slow, slow
