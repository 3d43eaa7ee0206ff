"""What a run shows beside its loss: speed, the share of the machine's peak, gates, and loads of routers.

    MFU = (tokens / s) (6 P + 12 L d n) / (processes x peak)

Tokens are those that are not padding. P: parameters without the embedding, L layers, d hidden, n tokens of
the window; what memories compute beyond their parameters is not counted; the peak is that of a square
matrix product, measured here once. Source: PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from memlib import __version__
from memlib.config import Config
from memlib.nn.hook_point import HookPoint
from memlib.training.parallel.apply import DTYPES
from memlib.training.parallel.ranks import Ranks

GATES = ("fusion.weight", "writer.input", "writer.forget")


class Monitor:
    """Speed since the last report, and means over the tokens of one step.

    parameters: of the whole model, without the embedding.
    """

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, parameters: int) -> None:
        size = config.model
        self.ranks, self.dtype = ranks, DTYPES[config.parallel.mixed_precision] or torch.float32
        attention = 12 * size.num_layers * size.hidden_dim * size.segment_length
        self.flops_per_token = 6 * parameters + attention
        self.points = {
            f"{name.removeprefix('blocks.').partition('.')[0]}.{point.name}": point
            for name, point in model.named_modules()
            if isinstance(point, HookPoint) and (point.name.endswith(GATES) or point.axes[-1] == "chapter")
        }
        self.found: dict[str, list[Tensor]] = {}
        self.tokens, self.since = 0, time.perf_counter()

    @contextmanager
    def listening(self, on: bool) -> Iterator[None]:
        """Note what gates and routers do inside, if on."""
        with ExitStack() as stack:
            for name, point in self.points.items() if on else ():
                stack.enter_context(point.listening(partial(self.note, name, point)))
            yield

    def note(self, name: str, point: HookPoint, value: Tensor) -> None:
        """Means over rows and tokens; of a choice of chapters, how often each is chosen."""
        value = value.detach().float()
        if point.axes[-1] == "chapter":
            chosen = (value > 0).float() if name.endswith("weight") else value
            means = {f"{name}.{i}": part for i, part in enumerate(chosen.flatten(0, -2).mean(0))}
        elif point.axes[-1] == "source":  # the attention first, then the memories
            means = {name: 1 - value[..., 0].mean()}
        else:
            means = {name: value.mean()}
        for key, mean in means.items():
            self.found.setdefault(key, []).append(mean)

    def report(self) -> dict[str, float]:
        """Tokens per second, MFU, gates and loads since the last report; all processes must call it."""
        own = {name: float(torch.stack(parts).mean()) for name, parts in self.found.items()}
        parts = cast(list[dict[str, float]], self.ranks.gather(own))
        means = {}
        for name in sorted({name for part in parts for name in part}):
            values = [part[name] for part in parts if name in part]
            means[name] = sum(values) / len(values)
        now = time.perf_counter()
        speed = self.tokens / (now - self.since)
        peak = matmul_flops(self.ranks.device, self.dtype) * len(parts)
        self.found, self.tokens, self.since = {}, 0, time.perf_counter()
        return {"tokens_per_second": speed, "mfu": speed * self.flops_per_token / peak, **means}


@lru_cache
def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations per second of a product of two square matrices, the best of three."""
    size = size if device.type == "cpu" else 8 * size
    a, best = torch.ones(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(4):  # the first one warms up
        begin = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def environment(ranks: Ranks) -> dict[str, object]:
    """What made a run: versions, code, machine and command."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "memlib": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": str(ranks.device),
        "processes": ranks.count,
        **git_state(),
    }


@lru_cache
def git_state() -> dict[str, object]:
    """The commit of memlib's code and whether files differ from it; None outside a repository."""
    found = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        except (OSError, subprocess.CalledProcessError):
            return {"commit": None, "changed": None}
    return {"commit": found[0], "changed": bool(found[1])}
