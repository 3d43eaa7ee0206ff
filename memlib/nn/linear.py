"""Linear maps and embeddings with the start that every model here uses.

`reset_parameters` of each module sets what that module owns, and `initialise` calls it for a module and
all inside it: after building, and on a model that was built on the meta device and moved by `to_empty`.

Axes: b batch, n tokens, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """y = x W^T + b.  W starts normal with deviation scale / sqrt(in_features), b at zero."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, scale: float = 1.0) -> None:
        self.scale = scale  # before nn.Linear's constructor, which resets the parameters
        super().__init__(in_features, out_features, bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0.0, self.scale * self.in_features**-0.5)
        if self.bias is not None:
            self.bias.zero_()


class Embedding(nn.Embedding):
    """Rows of a table, which start normal with deviation 1 / sqrt(embedding_dim)."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0.0, self.embedding_dim**-0.5)


def initialise(module: nn.Module) -> nn.Module:
    """Give every parameter and every buffer its start: `reset_parameters` of each module inside, in order."""
    for part in module.modules():
        reset: Callable[[], None] | None = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()
    return module


def unit(vectors: Tensor) -> Tensor:
    """Vectors at length 1, zero where they are zero, also in half precision: [... k] -> [... k]."""
    smallest = max(1e-12, torch.finfo(vectors.dtype).tiny)
    return F.normalize(vectors, dim=-1, eps=smallest)


def vectors_for_scalars(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook for loading weights of version 0.1, which saved parameters of one number without an axis."""
    for name, _parameter in module.named_parameters(recurse=False):
        saved = state_dict.get(prefix + name)
        if saved is not None and not saved.ndim:
            state_dict[prefix + name] = rearrange(saved, "-> 1")
