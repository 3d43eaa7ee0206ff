"""Which layers LoRA adapts, and with which rank and alpha, by PEFT's rules for names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from memlib.nn.linear import Linear

Value = TypeVar("Value", int, float)


def find_layers(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The layers that targets mean, by name.

    targets: last parts of layer names (["q_proj", "v_proj"]), a regular expression for complete names, or
    "all-linear": every linear layer but the output layer and memlib's gates.

    Only `nn.Linear` and memlib's `Linear` themselves can be adapted. The weight of a subclass may be read
    without calling the layer: memlib's gates, PyTorch's MultiheadAttention, quantised layers.

    Raises ValueError if a target matches no layer or one that cannot be adapted, or if the model has LoRA.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if any(hasattr(module, "lora_A") for module in modules.values()):
        raise ValueError(
            "the model has LoRA already: use remove_lora(model) first, or unload() of a PEFT model"
        )
    plain = {name: module for name, module in modules.items() if type(module) in (nn.Linear, Linear)}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        output = output_layer(model)
        conv = {name: module for name, module in modules.items() if type(module).__name__ == "Conv1D"}
        found = {name: module for name, module in (plain | conv).items() if module is not output}
    else:
        found = {name: module for name, module in modules.items() if is_target(name, targets)}
    each = [] if isinstance(targets, str) else targets
    unmatched = [target for target in each if not any(is_target(name, [target]) for name in found)]
    if unmatched or not found:
        raise ValueError(
            f"LoRA targets {unmatched or targets!r} match no layer; linear layers here: {last_parts(plain)}. "
            "Targets are a list of last parts of names, a regular expression for complete names, "
            'or "all-linear"'
        )
    for name, module in found.items():
        if name not in plain:
            raise ValueError(
                f"LoRA target {name} is a {type(module).__name__}: only nn.Linear and memlib's Linear can be "
                f"adapted; linear layers here: {last_parts(plain)}"
            )
    return {name: plain[name] for name in found}


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that computes the logits: `head` in memlib, in transformers what the model says."""
    ask = getattr(model, "get_output_embeddings", None)
    return ask() if ask is not None else getattr(model, "head", None)


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether targets mean the module of this name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the layer of this name.

    A key is a regular expression for the last part or parts of a name; with ^ for the complete name.
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def matches_any(pattern: str, names: Iterable[str]) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means one of these layers."""
    return any(pattern_matches(pattern, name) for name in names)


def value_for(name: str, patterns: Mapping[str, Value] | None, default: Value) -> Value:
    """The value of the first pattern that matches, else the default."""
    return next((value for key, value in (patterns or {}).items() if pattern_matches(key, name)), default)


def last_parts(names: Iterable[str]) -> str:
    """Names without their paths, each once, for messages."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
