"""The precision of each block, chosen by a budget of measured error.

A block runs in full precision, in bf16 (weights and activations; states stay float32), or with int8 weights
of its linear maps. The error is what this does to the model's predictions on given tokens, against the model
as it is: the mean over tokens of KL(p || q) in nats.

Each block is first measured alone at each lower level. Then, in the order of error per byte saved, a block is
lowered if the error of the whole model with it, measured again, stays within the budget. Errors of blocks
need not add up, and nothing is assumed of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.evaluation.table import markdown
from memlib.memory.chapters.quantization import dequantize_memory_bank, quantize_memory_bank
from memlib.models.block import BlockOutput
from memlib.models.eval_mode import eval_mode
from memlib.models.transformer import MemoryTransformer
from memlib.nn.linear import Linear

LEVELS = ("full", "bf16", "int8")


@dataclass(frozen=True)
class Precision:
    """levels: one of `LEVELS` for each block; error: of the whole model with them, in nats; nbytes: of all
    blocks' parameters and buffers."""

    budget: float
    levels: list[str]
    error: float
    nbytes: int


class Int8Linear(nn.Module):
    """A `Linear` with weights in 8 bits, a scale for each 64; it computes in the type of its input."""

    quantized: Tensor
    scales: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        for name, tensor in zip(("quantized", "scales"), quantize_memory_bank(linear.weight), strict=True):
            self.register_buffer(name, tensor)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The rounded weights."""
        return dequantize_memory_bank(self.quantized, self.scales)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight.to(inputs.dtype), self.bias)


@torch.no_grad()
def lower(model: MemoryTransformer, levels: Sequence[str]) -> MemoryTransformer:
    """Give each block its level, in place, for inference; returns the model.

    Raises ValueError for other levels or another number of them, and where blocks share parameters.
    """
    if len(levels) != len(model.blocks) or not set(levels) <= set(LEVELS):
        raise ValueError(f"levels = {list(levels)}: one of {LEVELS} for each of {len(model.blocks)} blocks")
    if len({id(p) for b in model.blocks for p in b.parameters()}) < sum(nparameters(b) for b in model.blocks):
        raise ValueError(
            "blocks share parameters, so they cannot differ: use memory.memory_sharing: per_layer"
        )
    for block, level in zip(model.blocks, levels, strict=True):
        if level == "bf16":
            block.to(torch.bfloat16)
            block.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16), *inputs[1:]))
            block.register_forward_hook(widened)
        elif level == "int8":
            for parent in list(block.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is Linear:  # gates, which are few, keep their precision
                        setattr(parent, name, Int8Linear(child))
    return model


def widened(block: nn.Module, inputs: Any, output: BlockOutput) -> BlockOutput:
    """The residual stream between blocks is float32."""
    return output._replace(residual=output.residual.float())


def nparameters(module: nn.Module) -> int:
    return len(list(module.parameters()))


def choose(model: MemoryTransformer, batches: Sequence[Tensor], budget: float) -> Precision:
    """The levels for a budget in nats, measured on token ids [b t]; the model stays as it is."""
    before = predictions(model, batches)

    def measure(levels: Sequence[str]) -> tuple[float, int]:
        trial = lower(deepcopy(model), levels)
        after = predictions(trial, batches)
        error = float((before.exp() * (before - after)).sum(-1).mean())
        tensors = [t for block in trial.blocks for t in (*block.parameters(), *block.buffers())]
        return error, sum(t.numel() * t.element_size() for t in tensors)

    best = ["full"] * len(model.blocks)
    error, nbytes = measure(best)
    whole, order = nbytes, list[tuple[float, int, str]]()
    for block, level in product(range(len(best)), LEVELS[1:]):
        alone, size = measure([level if i == block else "full" for i in range(len(best))])
        order.append((alone / max(whole - size, 1), block, level))
    for _, block, level in sorted(order):
        levels = [level if i == block else kept for i, kept in enumerate(best)]
        total, size = measure(levels)
        if total <= budget and size < nbytes:
            best, error, nbytes = levels, total, size
    return Precision(budget, best, error, nbytes)


@torch.inference_mode()
def predictions(model: MemoryTransformer, batches: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of every token of every batch: [b t v]."""
    with eval_mode(model):
        return torch.cat([model(ids).logits.double().log_softmax(-1) for ids in batches])


def to_table(results: Sequence[Precision]) -> str:
    """Results as a Markdown table."""
    rows = [[f"{r.budget:g}", ", ".join(r.levels), f"{r.error:.2g}", f"{r.nbytes:,}"] for r in results]
    return markdown(["budget, nats", "blocks", "error, nats", "bytes of blocks"], rows)
