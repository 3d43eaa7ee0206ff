"""The norm of gradients that lie on several processes, and clipping by it.

Parameters of one model may be divided in different ways: norms of layers are whole on every rank, matrices
are shards over some axes of the mesh. The squares of each kind are summed over the ranks that hold its
shards.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memlib.training.parallel.ranks import AXES, Ranks


def fill_missing(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros for gradients that this step did not reach, so that every layout decays the same weights.

    FSDP gives a group's parameters zeros where others of the group have gradients.
    """
    for p in parameters:
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)


def clip(parameters: Iterable[nn.Parameter], limit: float, ranks: Ranks) -> float:
    """Scale all gradients by limit / norm if their norm is above the limit; returns the norm before it.

    A norm that is NaN scales nothing, so that the gradients still show which of them are bad.
    """
    found = [p for p in parameters if p.grad is not None]
    if ranks.mesh is None:
        total = nn.utils.get_total_norm([p.grad for p in found if p.grad is not None])
        if not total.isnan():
            nn.utils.clip_grads_with_norm_(found, limit, total)
        return float(total)
    norm = gradient_norm([p.grad for p in found if p.grad is not None], ranks)
    factor = min(1.0, limit / (norm + 1e-6))
    for p in found:
        if p.grad is not None and factor < 1:
            p.grad.mul_(factor)
    return norm


@torch.no_grad()
def gradient_norm(gradients: list[Tensor], ranks: Ranks) -> float:
    """The Euclidean norm of all gradients of all processes, equal on every one."""
    squares: dict[tuple[int, ...], Tensor] = {}  # by the axes of the mesh over which they are divided
    for gradient in gradients:
        divided: tuple[int, ...] = ()
        if isinstance(gradient, DTensor):
            axes = zip(gradient.device_mesh.mesh_dim_names or (), gradient.placements, strict=True)
            divided = tuple(AXES.index(axis) for axis, placed in axes if not placed.is_replicate())
            gradient = gradient.to_local()
        squares[divided] = squares.get(divided, 0) + gradient.double().square().sum()
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for divided, part in squares.items():
        total += ranks.all_reduce(part, [AXES[axis] for axis in divided])
    ranks.all_reduce(total, ["stage", "tensor"])  # over `tensor` only to agree: all have the same sum
    return float((total / ranks.size("tensor")).sqrt())
