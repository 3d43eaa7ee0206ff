"""LoRA: a frozen linear layer plus a trained product of two thin matrices.

    y = W x + b + s B A dropout(x)        s = alpha / rank, or alpha / sqrt(rank) with use_rslora

A is Kaiming uniform and B zero, so that an adapted model starts as exactly the base model. Merging adds s B A
to W, and the layer then costs no more than the base layer.

The same model in PEFT gives the same outputs and gradients (tests/pretrained/test_lora.py).
Sources: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732 (use_rslora);
functions: "Core Package" (docs/coverage.md).

Axes: i input features, o output features, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import einsum
from torch import Tensor, nn

from memlib.pretrained.targets import find_layers, last_parts, matches_any, value_for


class LoRAFactor(nn.Linear):
    """A, or B with `zero`, by its start; nn.Linear's own start is Kaiming uniform, as in PEFT."""

    parameter_group = "lora"

    def __init__(self, in_features: int, out_features: int, zero: bool = False) -> None:
        self.zero = zero  # before nn.Linear's constructor, which resets the parameters
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        if self.zero:
            nn.init.zeros_(self.weight)
        else:
            super().reset_parameters()


class LoRALinear(nn.Module):
    """A linear layer with LoRA: [... i] -> [... o].

    A and B are float32, or float64 with a float64 base, also where the base is in half precision. This module
    casts: its input to the type of A and B, the sum back to the type of the base layer's output.

    Raises ValueError unless rank is an integer of at least 1 and dropout in [0, 1).
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        alpha: float,
        *,
        use_rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank = {rank!r}: must be an integer of at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout!r}: must be at least 0 and below 1")
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scaling = alpha / (rank**0.5 if use_rslora else rank)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.merged = False
        self.base_layer = base_layer
        self.dropout = nn.Dropout(dropout)
        self.lora_A = LoRAFactor(self.in_features, rank)
        self.lora_B = LoRAFactor(rank, self.out_features, zero=True)
        weight = base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        for part in (self.lora_A, self.lora_B):
            part.to(weight.device, wide)
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        output = self.base_layer(x)
        if self.merged:
            return output
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return (output + update * self.scaling).to(output.dtype)

    def delta(self) -> Tensor:
        """s B A: [o i], in the type of A and B."""
        return einsum(self.lora_B.weight, self.lora_A.weight, "o r, r i -> o i") * self.scaling

    @property
    def weight(self) -> Tensor:
        """W + s B A: [o i], for code that reads a layer's weight instead of calling the layer."""
        weight = self.base_layer.weight
        return weight if self.merged else (weight + self.delta()).to(weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add s B A to W, rounding once to the type of W. No effect on a merged layer."""
        if not self.merged:
            self.base_layer.weight.add_(self.delta())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract s B A from W. No effect on a layer that is not merged.

        W is restored up to rounding: up to one unit in the last place of the larger of W and W + s B A.
        """
        if self.merged:
            self.base_layer.weight.sub_(self.delta())
            self.merged = False

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, use_rslora={self.use_rslora}, merged={self.merged}"


def apply_lora_to_model(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    *,
    use_rslora: bool = False,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    freeze_base: bool = True,
) -> list[str]:
    """Replace the model's target layers by `LoRALinear`, in place; returns their names.

    targets: last parts of layer names (["q_proj", "v_proj"]), a regular expression for complete names, or
    "all-linear": every linear layer but the output layer and memlib's gates.
    rank_pattern, alpha_pattern: other ranks and alphas for some layers, by a regular expression for the last
    part or parts of a name; the first match counts. freeze_base: freeze all other parameters of the model.

    Raises ValueError, and changes nothing, if a target or pattern matches no layer, if a target is not a
    plain linear layer, or if the model has LoRA already.
    """
    layers = find_layers(model, targets)
    for pattern in (*(rank_pattern or {}), *(alpha_pattern or {})):
        if not matches_any(pattern, layers):
            raise ValueError(
                f"pattern {pattern!r} matches none of the target layers {last_parts(layers)}: "
                "patterns are regular expressions for the last part or parts of a layer's name"
            )
    adapted: dict[nn.Module, nn.Module] = {
        base: LoRALinear(
            base,
            value_for(name, rank_pattern, rank),
            value_for(name, alpha_pattern, alpha),
            use_rslora=use_rslora,
            dropout=dropout,
        )
        for name, base in layers.items()
    }
    if freeze_base:
        model.requires_grad_(False)
    replace_modules(model, adapted)
    return list(layers)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by name. Raises ValueError if there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no LoRA: use apply_lora_to_model or load_lora")
    return layers


def get_lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every LoRA layer, for an optimizer."""
    parts = [part for layer in lora_layers(model).values() for part in (layer.lora_A, layer.lora_B)]
    return [parameter for part in parts for parameter in part.parameters()]


def merge_lora_weights(model: nn.Module) -> None:
    """Add every update to its base weight, for inference. Merged layers stay as they are.

    Raises ValueError, and changes nothing, if another module has the same weight, as an output layer tied to
    the embedding: the update would change that module too.
    """
    layers = lora_layers(model)
    owners: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append(f"{name}.{own}")
    for layer in layers.values():
        names = owners[layer.base_layer.weight]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one tied weight: merging would add the update to both; "
                "use the model unmerged, or untie them before apply_lora_to_model"
            )
    for layer in layers.values():
        layer.merge()


def unmerge_lora_weights(model: nn.Module) -> None:
    """Subtract every merged update from its base weight, for training; exact up to rounding."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_lora(model: nn.Module, keep_merged: bool = False) -> list[str]:
    """Put the original modules back, in place; returns their names. Frozen parameters stay frozen.

    keep_merged: keep the updates in the weights. Raises ValueError, and changes nothing, if a layer is merged
    and keep_merged is false, or the other way round.
    """
    layers = lora_layers(model)
    if wrong := [name for name, layer in layers.items() if layer.merged != keep_merged]:
        raise ValueError(
            f"{last_parts(wrong)}: {'not ' * keep_merged}merged, but keep_merged={keep_merged}; use "
            f"{'un' * (not keep_merged)}merge_lora_weights(model) first, or the other keep_merged"
        )
    replace_modules(model, {layer: layer.base_layer for layer in layers.values()})
    return list(layers)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, wherever the model has them."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])
