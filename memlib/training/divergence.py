"""Stop a run with a loss or a gradient that is not finite, and say where it went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from memlib.models.block import BlockOutput, TransformerBlock
from memlib.training.checkpoint import latest_checkpoint
from memlib.training.parallel.ranks import Ranks, local


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite; the message names the step, the parameters and remedies."""


def check_finite(
    loss: float,
    norm: float,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    max_grad_norm: float,
    folder: Path | None,
    read_again: Callable[[], None] | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Raise TrainingDiverged unless loss and gradient norm of a step are finite; both are of all ranks.

    folder: of the run, for the name of its last checkpoint; read_again: repeats the step's forward pass, to
    find the first module that gives a bad number.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    named = list(model.named_parameters())
    weights = [name for name, p in named if bad(p)]
    gradients = [name for name, p in named if bad(p.grad)]
    found = f"weights not finite: {weights[0]}" if weights else "all weights are finite"
    if gradients:
        found += (
            f"; {len(gradients)} of {len(named)} gradients are not finite, first {gradients[0]}, "
            f"last {gradients[-1]} (the backward pass reaches the last one first)"
        )
    if read_again is not None:
        with first_bad_output(model) as modules:
            read_again()
        if modules:
            found += f"; first bad output in the forward pass: of {modules[0]}"
    parts = [found] if ranks is None else cast(list[str], ranks.gather(found))
    found = (
        parts[0] if len(set(parts)) == 1 else "; ".join(f"rank {r}: {part}" for r, part in enumerate(parts))
    )
    rates = ", ".join(f"{g['name']} {g['lr']:.1e}" for g in optimizer.param_groups)
    saved = latest_checkpoint(folder) if folder else None
    raise TrainingDiverged(
        f"step {step}: loss {loss}, gradient norm {norm}; {found}. Rates: {rates}. "
        f"Last checkpoint: {saved or 'none'}. "
        f"Try a smaller learning rate, a longer warm-up, or training.max_grad_norm below {max_grad_norm}"
    )


def bad(tensor: Tensor | None) -> bool:
    """Whether this process's part of a tensor holds NaN or an infinity."""
    return tensor is not None and not bool(torch.isfinite(local(tensor)).all())


@contextmanager
def first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """Inside, note the names of modules and memory states that get NaN or +inf, innermost and earliest first.

    A state is named by its block, its memory and its tensor. -inf is none: a gate that is shut has it.
    """
    found: list[str] = []

    def note(name: str, module: nn.Module, given: object, output: object) -> None:
        named = [(name, tensor) for tensor in tree_leaves(output)]
        if isinstance(output, BlockOutput):
            written = zip(cast(TransformerBlock, module).memories, output.states, strict=False)
            named = [(name, output.residual)]
            for kind, state in written:
                named += state.named_tensors(f"{name}.memories.{kind}.")
        for label, t in named:
            if isinstance(t, Tensor) and t.is_floating_point() and bool((t.isnan() | t.isposinf()).any()):
                found.append(label)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(partial(note, name))
            stack.callback(handle.remove)
        yield found
