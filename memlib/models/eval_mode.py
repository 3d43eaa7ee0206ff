"""Temporarily switch a model to eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from memlib.models.protocol import RecurrentModel


# How many threads are inside for a model, and whether it was training before the first of them.
_inside: WeakKeyDictionary[Any, tuple[int, bool]] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def eval_mode(model: nn.Module | RecurrentModel) -> Iterator[None]:
    """Inside, the model is in eval mode, without dropout and noise; afterwards it is as before.

    Several threads may be inside: the last one to leave restores what the first one found.
    """
    with _lock:
        count, was_training = _inside.get(model, (0, model.training))
        _inside[model] = count + 1, was_training
        if not count:
            model.eval()
    try:
        yield
    finally:
        with _lock:
            count, was_training = _inside.pop(model)
            if count > 1:
                _inside[model] = count - 1, was_training
            else:
                model.train(was_training)
