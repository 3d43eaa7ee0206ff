"""Where each family of pretrained models keeps its layers.

A family is one line: the `model_type` of its transformers configuration, and a function that returns the
list of decoder layers. A layer must return the residual stream, alone or first of a tuple, and the model
must hand unknown keywords down to its layers, as transformers' decoder models do.

    FAMILIES["gpt2"] = lambda base: base.transformer.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Layers = Callable[[Any], nn.ModuleList]

FAMILIES: dict[str, Layers] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3"),  # Llama 2 and 3, Mistral, Qwen 2.5 and 3
    lambda base: base.model.layers,
)


def decoder_layers(base: Any) -> nn.ModuleList:
    """The layers of a pretrained model, first to last; ValueError for a family that nobody has added."""
    kind = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    if kind not in FAMILIES:
        raise ValueError(
            f"base model of type {kind!r}: known are {', '.join(FAMILIES)}; add it with "
            f"memlib.pretrained.families.FAMILIES[{kind!r}] = a function that returns its decoder layers"
        )
    return FAMILIES[kind](base)
