"""What a configuration may hold: types, limits and combinations, and errors that name the full path."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from memlib.config.schema import Config, ConfigError, MemoryConfig, Stage, get_memory_layer_indices


def describe(kind: Any) -> str:
    """A type as a person would say it."""
    if kind is type(None):
        return "null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe(k) for k in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {describe(get_args(kind)[0])}"
    if get_origin(kind) is dict or is_dataclass(kind):
        return "a mapping"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]


def convert(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind`, or a ConfigError that says what would be right."""
    wrong = ConfigError(f"{path} = {value!r}: expected {describe(kind)}")
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        (inner,) = [k for k in get_args(kind) if k is not type(None)]
        return convert(value, inner, path)
    if origin is Literal:
        if value not in get_args(kind):
            raise wrong
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return [convert(v, get_args(kind)[0], f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return dict(value)
    if is_dataclass(kind):
        return value if type(value) is kind else from_dict(kind, value, path)
    if kind is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as text
            return float(value)
        except ValueError:
            raise wrong from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    return value


def from_dict(kind: Any, values: Any, path: str = "") -> Any:
    """A dataclass from a mapping; unknown keys and wrong types are refused with their full path."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the file'} = {values!r}: expected a mapping")
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown key; known here: {', '.join(known)}")
    return kind(**{key: convert(value, hints[key], prefix + key) for key, value in values.items()})


def check_fields(config: Any, path: str) -> None:
    hints = get_type_hints(type(config))
    for f in fields(config):
        here, value = f"{path}.{f.name}" if path else f.name, getattr(config, f.name)
        if is_dataclass(value):
            check_fields(value, here)
            continue
        setattr(config, f.name, value := convert(value, hints[f.name], here))
        for i, item in enumerate(value if isinstance(value, list) else ()):
            if is_dataclass(item):
                check_fields(item, f"{here}[{i}]")
        low, high = f.metadata.get("low"), f.metadata.get("high")
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if low is not None and not value >= low:
            raise ConfigError(f"{here} = {value}: must be at least {low}")
        if high is not None and not value <= high:
            raise ConfigError(f"{here} = {value}: must be at most {high}")


def validate(config: Config) -> Config:
    """Check types, limits and combinations; returns the config, raises ConfigError."""
    check_fields(config, "")
    model, memory, task = config.model, config.memory, config.task
    if model.hidden_dim % model.num_heads:
        raise ConfigError(
            f"model.num_heads = {model.num_heads}: must divide model.hidden_dim = {model.hidden_dim}"
        )
    if model.use_rope and (model.hidden_dim // model.num_heads) % 2:
        raise ConfigError(
            f"model.num_heads = {model.num_heads}: rotary positions need an even head width, "
            f"not {model.hidden_dim // model.num_heads}; change num_heads or set model.use_rope: false"
        )
    known = [f.name for f in fields(MemoryConfig) if is_dataclass(getattr(memory, f.name))]
    for i, kind in enumerate(memory.kinds):
        if kind not in known:
            raise ConfigError(f"memory.kinds[{i}] = {kind!r}: known memories: {', '.join(known)}")
        if kind in memory.kinds[:i]:
            raise ConfigError(f"memory.kinds[{i}] = {kind!r}: named twice")
    if memory.memory_layer_placement == "custom":
        if not memory.memory_layer_custom:
            raise ConfigError("memory.memory_layer_custom: needed when memory_layer_placement is custom")
        for i, layer in enumerate(memory.memory_layer_custom):
            if not 0 <= layer < model.num_layers:
                raise ConfigError(
                    f"memory.memory_layer_custom[{i}] = {layer}: "
                    f"layers are 0 … {model.num_layers - 1}; change it or model.num_layers"
                )
    if memory.kinds and not memory.vanilla_mode and not get_memory_layer_indices(config):
        raise ConfigError(
            f"memory.memory_layer_n = {memory.memory_layer_n}: no layer has memory with "
            f"model.num_layers = {model.num_layers}; make it smaller"
        )
    for kind in memory.kinds:
        getattr(memory, kind).check(config, f"memory.{kind}")
    if memory.memory_block_variant == "B" and memory.fusion == "softmax":
        raise ConfigError(
            "memory.memory_block_variant = 'B': exists for memory.fusion: residual only; "
            "set fusion: residual or memory_block_variant: A"
        )
    if task.segments_min is not None and task.segments_min > task.segments:
        raise ConfigError(
            f"task.segments_min = {task.segments_min}: must be at most task.segments = {task.segments}"
        )
    steps = [stage.from_step for stage in config.training.curriculum]
    if steps != sorted(set(steps)):
        raise ConfigError(f"training.curriculum: from_step must rise from stage to stage, not {steps}")
    for i, stage in enumerate(config.training.curriculum):
        check_stage(config, stage, f"training.curriculum[{i}].set")
    return config


def check_stage(config: Config, stage: Stage, path: str) -> None:
    try:
        override(config.task, stage.set)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def override(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a config dataclass with the fields at the given dotted paths replaced.

    >>> override(Config(), {"model.num_layers": 2}).model.num_layers
    2
    """
    values = dataclasses.asdict(config)
    for path, value in changes.items():
        *groups, name = path.split(".")
        node, kind = values, type(config)
        for i, group in enumerate(groups):
            if group not in node or not isinstance(node[group], dict):
                raise ConfigError(f"{'.'.join(groups[: i + 1])}: unknown key; known here: {', '.join(node)}")
            node, kind = node[group], get_type_hints(kind)[group]
        if name not in node:
            raise ConfigError(f"{path}: unknown key; known here: {', '.join(node)}")
        node[name] = value
    changed = from_dict(type(config), values)
    check_fields(changed, "")
    return changed
