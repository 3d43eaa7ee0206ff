"""Cost of a sliding attention window: time and memory of a forward and backward pass, beside full attention.

Measured for the attention alone and for a plain transformer, on the same segments, window by window in
turns: the median processor time of one thread in ROUNDS rounds, and the most bytes allocated at once.

Axes: b batch, h heads, n tokens, k head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from memlib.config import Config, ModelConfig
from memlib.evaluation.complexity import peak_bytes, seconds
from memlib.evaluation.table import markdown
from memlib.models import MemoryTransformer
from memlib.ops import attention, flash_attention
from memlib_kernels.attention import BAND

ROUNDS, SEED = 7, 0
BATCH, HEADS, TOKENS, WIDTH = 4, 8, 1024, 64
WINDOWS = (None, 512, 256, 128, 64)
LAYERS = 2


@dataclass(frozen=True)
class WindowCost:
    """part: "attention" or "model"; window: None for all tokens; seconds, bytes: of forward and backward;
    gigaflops: of the attention's products in them, as many as the CPU path computes."""

    part: str
    window: int | None
    seconds: float
    bytes: int
    gigaflops: float


def measure_all(log: Callable[[str], None] = print, rounds: int = ROUNDS) -> list[WindowCost]:
    """Measure both parts with every window; about two minutes."""
    results, threads = list[WindowCost](), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part, make, layers in (("attention", attending, 1), ("model", training, LAYERS)):
            torch.manual_seed(SEED)
            calls = {window: make(window) for window in WINDOWS}
            times = [{window: seconds(call) for window, call in calls.items()} for _ in range(rounds)]
            for window, call in calls.items():
                spent = round(median(turn[window] for turn in times), 4)
                results.append(
                    WindowCost(part, window, spent, peak_bytes(call), round(layers * gigaflops(window), 2))
                )
                log(f"{part}, window {window}: {spent:.3f} s")
    finally:
        torch.set_num_threads(threads)
    return results


def attending(window: int | None) -> Callable[[], object]:
    """Causal attention of one batch, [b h n k], and its gradients."""
    tensors = [torch.randn(BATCH, HEADS, TOKENS, WIDTH, requires_grad=True) for _ in range(3)]

    def call() -> object:
        if window is None:
            out = attention(*tensors, causal=True)
        else:
            out = flash_attention(*tensors, causal=True, window=window)[0]
        return torch.autograd.grad(out.sum(), tensors)

    return call


def training(window: int | None) -> Callable[[], object]:
    """A plain transformer's loss of one segment, and its gradients."""
    options = ModelConfig(
        hidden_dim=HEADS * WIDTH,
        num_heads=HEADS,
        num_layers=LAYERS,
        intermediate_dim=1024,
        vocab_size=256,
        segment_length=TOKENS,
        attention_window=window,
    )
    model = MemoryTransformer(Config(model=options))
    ids, parameters = torch.randint(256, (BATCH, TOKENS)), list(model.parameters())

    def call() -> object:
        loss = model(ids, labels=ids).loss
        assert loss is not None
        return torch.autograd.grad(loss, parameters)

    return call


def gigaflops(window: int | None) -> float:
    """Of seven products of 2 k operations a score: two forward, five backward."""
    scores = TOKENS * (TOKENS + 1) / 2
    if window is not None:  # in blocks, or with a mask
        scores = TOKENS * min(TOKENS, 2 * max(BAND, window))
    return 14 * WIDTH * BATCH * HEADS * scores / 1e9


def to_table(results: Sequence[WindowCost]) -> str:
    """Results as a Markdown table, with ratios to full attention of the same part."""
    full = {r.part: r for r in results if r.window is None}
    rows = [
        [
            r.part,
            str(r.window or "all"),
            f"{r.gigaflops:.1f}",
            f"{r.seconds:.3f}",
            f"{r.seconds / full[r.part].seconds:.2f}",
            f"{r.bytes / 2**20:.0f}",
            f"{r.bytes / full[r.part].bytes:.2f}",
        ]
        for r in results
    ]
    return markdown(
        ["part", "window", "GFLOP of attention", "seconds", "ratio", "MiB at most", "ratio"], rows
    )
