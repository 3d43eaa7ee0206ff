"""Speed of the operations beside their peers: medians of runs in turns, in one process.

    python -m memlib_kernels.bench --json results.json        (or: memlib bench kernels)

On a CPU an operation's peer is torch's own attention, or the same computation written out: processor time of
one thread. On a GPU the peers are torch's attention and FlexAttention, and the floor that the roofline model
gives (roofline.py): time between CUDA events.

Axes: b batch, h heads, n queries, m keys or slots, k width.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memlib_kernels.addressed import addressed_read, addressed_read_reference
from memlib_kernels.attention import attention_with_lse, flash_attention, merge
from memlib_kernels.gated_write import gated_write, gated_write_traced
from memlib_kernels.memory_attention import memory_attention, memory_attention_reference
from memlib_kernels.roofline import markdown


@dataclass(frozen=True)
class Comparison:
    """op and peer take the same tensors; least: of peer's time as a multiple of op's, forward and with the
    backward pass, None where nothing is claimed."""

    name: str
    peer_name: str
    op: Callable[..., Any]
    peer: Callable[..., Any]
    tensors: Sequence[Tensor]
    least: tuple[float | None, float | None]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of an operation and its peer; speedup: the median of their ratios in turns.

    least: the claimed speedup; floor_ms: of the roofline model, both None where there is none.
    """

    name: str
    peer: str
    direction: str
    ms: float
    peer_ms: float
    speedup: float
    least: float | None = None
    floor_ms: float | None = None


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def comparisons() -> Iterator[Comparison]:
    """What is compared on a CPU, in float32."""
    torch.manual_seed(0)
    window = [normal(4, 8, 256, 64) for _ in range(3)]

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    name = "self-attention, 4 x 8 heads x 256 x 64"
    yield Comparison(
        name, "torch", lambda *x: flash_attention(*x, causal=True)[0], sdpa, window, (0.95, 0.95)
    )
    other = [torch.randn(4, 8, 256, 64), torch.randn(4, 8, 256)]

    def joint(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        return merge(*attention_with_lse(q, k, v, causal=True), out, lse)

    name = "joint softmax of window and memory, 4 x 8 heads x 256 x 64"
    yield Comparison(name, "torch, window alone", joint, sdpa, [*window, *other], (1 / 1.3, 1 / 1.3))
    for slots in (512, 4096):
        heads = [normal(4, 8, 256, 64), normal(4, 8, slots, 64), normal(4, 8, slots, 64)]
        name, explicit = f"read of {slots} slots, 8 heads of 64", "written out"
        yield Comparison(name, explicit, memory_attention, memory_attention_reference, heads, (2.0, 1.5))
        single = [normal(4, 256, 32), normal(4, slots, 32), normal(4, slots, 32)]
        name = f"read of {slots} slots of 32"
        yield Comparison(name, explicit, memory_attention, memory_attention_reference, single, (3.0, None))
        table = F.normalize(torch.randn(4, slots // 4, 32), dim=-1).requires_grad_()
        sharp = torch.tensor(4.0, requires_grad=True)
        address = [normal(4, 256, 4, 32), table, sharp, normal(4, 4, slots // 4, 128)]
        name = f"addressed read of {slots} slots of 128"
        yield Comparison(name, explicit, addressed_read, addressed_read_reference, address, (1.0, 1.0))

    def best(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return memory_attention(q, k, v, top_k=16)

    name = "read of the best 16 of 4096 slots of 32"
    yield Comparison(name, "all 4096", best, memory_attention, single, (1.0, 1.0))
    for slots, width in ((512, 64), (1024, 512)):
        rates = [torch.rand(4, 256, slots).mul_(0.05).requires_grad_() for _ in range(2)]
        write = [normal(4, slots, width), *rates, normal(4, 256, width)]
        name = f"gated write to {slots} slots of {width}"
        yield Comparison(name, "by logarithms", gated_write, gated_write_traced, write, (1.0, 1.0))


def with_backward(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], object]:
    """A call and its gradients for the tensors that have one."""
    learned = [t for t in tensors if t.requires_grad]
    return lambda: torch.autograd.grad(function(*tensors).sum(), learned)


def without_gradients(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], object]:
    plain = [t.detach() for t in tensors]
    return lambda: function(*plain)


def turns(
    calls: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Milliseconds of each call, `repeats` times, in turns; each is called once before."""
    for call in calls:
        call()
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, spent, strict=True):
            start = clock()
            call()
            times.append(1e3 * (clock() - start))
    return spent


def measure_all(repeats: int = 15, log: Callable[[str], None] = print) -> list[Timing]:
    """All comparisons on this machine's GPU, or on its CPU if it has none."""
    return measure_gpu(log) if torch.cuda.is_available() else measure_cpu(repeats, log)


GPU_SHAPES = ((4, 16, 2048, 64), (4, 16, 2048, 128), (1, 16, 16384, 128))  # b h n k


def measure_gpu(log: Callable[[str], None] = print) -> list[Timing]:
    """Causal attention in bfloat16 beside torch's attention and FlexAttention, with the roofline's floor."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from triton.testing import do_bench

    from memlib_kernels.roofline import GPUS, attention_backward_keys, attention_backward_queries
    from memlib_kernels.roofline import attention_forward as forward_work
    from memlib_kernels.traffic import Attention

    gpu = next((one for one in GPUS if one.name in torch.cuda.get_device_name()), None)
    flex = torch.compile(flex_attention)
    found = []
    for b, h, n, k in GPU_SHAPES:
        shape: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
        tensors = [torch.randn(b, h, n, k, **shape) for _ in range(3)]
        mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, n, n)
        calls: dict[str, Callable[..., Any]] = {
            "memlib": lambda *x: flash_attention(*x, causal=True)[0],
            "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "FlexAttention": lambda q, k, v, mask=mask: flex(q, k, v, block_mask=mask),
        }
        sizes = Attention(b, h, h, n, n, k, k, causal=True)
        forward = [forward_work(sizes)]
        both = [*forward, attention_backward_queries(sizes), attention_backward_keys(sizes)]
        for direction, call, works in (
            ("forward", without_gradients, forward),
            ("forward and backward", with_backward, both),
        ):
            ms = {name: float(do_bench(call(op, tensors))) for name, op in calls.items()}
            floor = None if gpu is None else 1e3 * sum(max(gpu.times(work).values()) for work in works)
            for peer in ("torch", "FlexAttention"):
                ratio = round(ms[peer] / ms["memlib"], 2)
                name = f"causal attention, {b} x {h} heads x {n} x {k}"
                found.append(Timing(name, peer, direction, ms["memlib"], ms[peer], ratio, None, floor))
                log(f"{name}, {direction}: {ms['memlib']:.3f} ms, {peer} {ms[peer]:.3f} ms, floor {floor}")
    return found


def measure_cpu(repeats: int = 15, log: Callable[[str], None] = print) -> list[Timing]:
    """All comparisons on this CPU. Set OMP_NUM_THREADS=1: processor time of several threads adds up."""
    found = []
    for one in comparisons():
        for direction, call, least in (
            ("forward", without_gradients, one.least[0]),
            ("forward and backward", with_backward, one.least[1]),
        ):
            calls = [call(one.op, one.tensors), call(one.peer, one.tensors)]
            mine, theirs = turns(calls, repeats, time.process_time)
            speedup = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
            ms, peer_ms = (round(statistics.median(times), 3) for times in (mine, theirs))
            found.append(Timing(one.name, one.peer_name, direction, ms, peer_ms, round(speedup, 2), least))
            log(f"{one.name}, {direction}: {ms:.2f} ms, {one.peer_name} {peer_ms:.2f} ms, x {speedup:.2f}")
    return found


def to_table(timings: Sequence[Timing]) -> str:
    """Timings as a Markdown table."""
    head = ["operation", "direction", "ms", "peer", "its ms", "speedup", "at least", "floor, ms"]
    rows = [
        [
            t.name,
            t.direction,
            f"{t.ms:.2f}",
            t.peer,
            f"{t.peer_ms:.2f}",
            f"{t.speedup:.2f}",
            *("–" if x is None else f"{x:.2f}" for x in (t.least, t.floor_ms)),
        ]
        for t in timings
    ]
    return markdown([head, ["---"] * len(head), *rows])


def machine() -> dict[str, str]:
    """What ran the benchmark."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="speed of the operations beside their peers")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args(argv)
    timings = measure_all(arguments.repeats, log=lambda line: None)
    print(to_table(timings))
    if arguments.json:
        text = json.dumps({"machine": machine(), "results": [asdict(t) for t in timings]}, indent=1)
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
