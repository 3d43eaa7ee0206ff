"""LoRA in PEFT's two files: `adapter_config.json` and `adapter_model.safetensors`.

A tensor of layer <name> has the key `base_model.model.<name>.lora_A.weight` [r i] or `….lora_B.weight` [o r].
Files pass from memlib to PEFT and back without any change of a value (tests/pretrained/test_peft_files.py).

Axes: i input features, o output features, r rank.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from memlib.files import write_bytes
from memlib.pretrained.lora import apply_lora_to_model, lora_layers
from memlib.pretrained.targets import find_layers, is_target, matches_any, value_for

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern",
    "alpha_pattern", "init_lora_weights",
}  # fmt: skip
# Fields that change neither outputs nor gradients of loaded weights.
NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config",
}  # fmt: skip
# Every other field must be off: None, false, "none" or empty.
REASONS = {
    "use_dora": "DoRA also learns the length of each weight column",
    "modules_to_save": "complete modules are trained and stored beside LoRA",
    "bias": "biases of the base model are trained and stored",
    "lora_bias": "B has a bias",
    "fan_in_fan_out": "base weights are transposed, as in GPT-2's Conv1D",
    "layers_to_transform": "only some of the target layers are adapted",
    "exclude_modules": "only some of the target layers are adapted",
    "target_parameters": "parameters other than linear layers are adapted",
    "trainable_token_indices": "rows of the embedding are trained",
    "layer_replication": "layers of the base model are repeated",
    "alora_invocation_tokens": "LoRA acts only after certain tokens",
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # the others change the base weights, or how to train


def save_lora(model: nn.Module, folder: str | os.PathLike[str], base_model_name: str | None = None) -> Path:
    """Write the model's LoRA as PEFT's two files; returns the folder.

    base_model_name: what PEFT loads the base model from; None: what a transformers model was loaded from.
    An interrupted save leaves the old adapter or an incomplete one that `load_lora` refuses, never a mixture.
    Raises ValueError for a model without LoRA, or with layers that differ in use_rslora or dropout.
    """
    layers = lora_layers(model)
    kinds = {(layer.use_rslora, layer.dropout.p) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"layers differ in (use_rslora, dropout): {kinds}; PEFT's file has one value for all"
        )
    [(use_rslora, dropout)] = kinds
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model_name
        or getattr(getattr(model, "config", None), "_name_or_path", None),
        "target_modules": list(layers),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "rank_pattern": {f"^{re.escape(n)}": layer.rank for n, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {
            f"^{re.escape(n)}": layer.alpha for n, layer in layers.items() if layer.alpha != alpha
        },
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        key_of(name, part): matrix.weight.detach().cpu().contiguous()
        for name, layer in layers.items()
        for part, matrix in (("A", layer.lora_A), ("B", layer.lora_B))
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    data = save(tensors, {"format": "pt"})
    (target / CONFIG).unlink(missing_ok=True)
    write_bytes(target / TENSORS, data)
    write_bytes(target / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return target


def load_lora(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Apply LoRA to a model and load its weights from PEFT's two files; returns the layers' names.

    The base is frozen and the LoRA weights are trainable. Raises ValueError, and changes nothing, if a file
    is missing or damaged, if the configuration has an option that memlib does not implement, or if tensors
    do not fit the model.
    """
    config, tensors = read_files(Path(folder))
    targets, rank = config["target_modules"], config.get("r", 8)
    if not isinstance(targets, str):  # PEFT ignores targets and patterns that match no layer
        names = [name for name, _ in model.named_modules()]
        targets = [t for t in targets if any(is_target(name, [t]) for name in names)] or targets
    layers = find_layers(model, targets)
    ranks, alphas = (
        {key: value for key, value in (config.get(field) or {}).items() if matches_any(key, layers)}
        for field in ("rank_pattern", "alpha_pattern")
    )
    shapes = {}
    for name, layer in layers.items():
        shapes[key_of(name, "A")] = [value_for(name, ranks, rank), layer.in_features]
        shapes[key_of(name, "B")] = [layer.out_features, value_for(name, ranks, rank)]
    check_tensors(tensors, shapes, Path(folder, TENSORS))
    apply_lora_to_model(
        model,
        targets,
        rank,
        config.get("lora_alpha", 8),
        use_rslora=config.get("use_rslora", False),
        dropout=config.get("lora_dropout", 0.0),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    with torch.no_grad():
        for name, adapted in lora_layers(model).items():
            adapted.lora_A.weight.copy_(tensors[key_of(name, "A")])
            adapted.lora_B.weight.copy_(tensors[key_of(name, "B")])
    return list(layers)


def key_of(layer: str, part: str) -> str:
    """The key of a layer's A or B in PEFT's file."""
    return f"base_model.model.{layer}.lora_{part}.weight"


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder; raises ValueError as `load_lora` does."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load((folder / TENSORS).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename}: no such file; save_lora writes it, and so does PEFT's save_pretrained"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged adapter files ({error}); use another copy") from None
    check_options(config, folder / CONFIG)
    return config, tensors


def check_options(config: Any, file: Path) -> None:
    """Raise ValueError for a configuration that is not plain LoRA, naming its options and the reasons."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not config.get("target_modules"):
        raise ValueError(
            f"{file}: not the configuration of a LoRA adapter with target_modules; memlib loads no other kind"
        )
    refused = [
        f"{field} = {value!r} ({REASONS.get(field, 'more than plain LoRA')})"
        for field, value in config.items()
        if field not in READ | NO_EFFECT
        and not (value is None or value is False or value in ("none", [], {}))
    ]
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        refused.append(f"init_lora_weights = {start!r} (this start changes the base weights or the training)")
    if refused:
        raise ValueError(
            f"{file}: memlib implements plain LoRA, not {'; '.join(refused)}; use PEFT to load it"
        )


def check_tensors(tensors: dict[str, Tensor], shapes: dict[str, list[int]], file: Path) -> None:
    """Raise ValueError unless these are the tensors that the model needs, in these shapes."""
    missing, surplus = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or surplus:
        raise ValueError(
            f"{file}: not for this model; missing tensors: {missing[:3] or 'none'}, tensors without a place: "
            f"{surplus[:3] or 'none'}; load it into the base model it was trained on"
        )
    for key, shape in shapes.items():
        if list(tensors[key].shape) != shape:
            raise ValueError(
                f"{file}: {key} has shape {list(tensors[key].shape)}, expected {shape}; load it into the "
                "base model it was trained on"
            )
