"""Temporarily switch a model to eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from memlib.models.protocol import RecurrentModel


@contextmanager
def eval_mode(model: nn.Module | RecurrentModel) -> Iterator[None]:
    """Inside, the model is in eval mode, without dropout and noise; afterwards it is as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
