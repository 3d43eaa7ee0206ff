"""Configuration fields: documentation, type, limits, and errors that name the full path.

The fields themselves are defined in `model.py`, `memory.py`, `task.py` and `training.py`.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

UNSET: Any = object()  # None may be an option's small value


class ConfigError(ValueError):
    """Invalid configuration; the message names the path, the value and the remedy."""


def option(
    default: Any,
    doc: str,
    low: float | None = None,
    high: float | None = None,
    known_as: str | None = None,
    small: Any = UNSET,
) -> Any:
    """A dataclass field with its documentation and inclusive limits; known_as: its other name.

    small: the value for tests, required for every integer option of a memory. It is small enough to be
    cheap and large enough to have several of everything.
    """
    metadata = {"doc": doc, "low": low, "high": high, "known_as": known_as}
    if small is not UNSET:
        metadata["small"] = small
    if isinstance(default, (list, dict)) or callable(default):
        factory = default if callable(default) else (lambda: type(default)(default))
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def describe(kind: Any) -> str:
    """A type in plain English, for error messages and docs/config.md."""
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


def paths_of(kind: Any, name: str, path: str = "") -> list[str]:
    """Paths of all fields of a config dataclass with this name, or known by this name (`known_as`)."""
    found = []
    for f in fields(kind):
        here, inner = f"{path}{f.name}", get_type_hints(kind)[f.name]
        if name in (f.name, f.metadata.get("known_as")):
            found.append(here)
        if is_dataclass(inner):
            found += paths_of(inner, name, f"{here}.")
    return found


def unknown(path: str, known: list[str], root: Any) -> ConfigError:
    """The error for a key that does not exist at `path` of `root`, with suggestions from elsewhere in it."""
    elsewhere = paths_of(root, path.rpartition(".")[2])
    hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
    return ConfigError(f"{path}: unknown key; known here: {', '.join(known)}{hint}")


def convert(value: Any, kind: Any, path: str, root: Any = None) -> Any:
    """Convert `value` to the type `kind`; raises ConfigError with the expected type."""
    wrong = ConfigError(f"{path} = {value!r}: expected {describe(kind)}")
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        (inner,) = [k for k in get_args(kind) if k is not type(None)]
        return convert(value, inner, path, root)
    if origin is Literal:
        if value not in get_args(kind):
            raise wrong
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return [convert(v, get_args(kind)[0], f"{path}[{i}]", root) for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return dict(value)
    if is_dataclass(kind):
        return value if type(value) is kind else from_dict(kind, value, path, root)
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


def from_dict(kind: Any, values: Any, path: str = "", root: Any = None) -> Any:
    """Build a dataclass from a mapping; an unknown key or wrong type raises ConfigError with its full path.

    root: the dataclass in which `path` begins; `kind` itself if None.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the file'} = {values!r}: expected a mapping")
    hints = get_type_hints(kind)
    known, root = [f.name for f in fields(kind)], root or kind
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in known:
            raise unknown(f"{prefix}{key}", known, root)
    return kind(**{key: convert(value, hints[key], prefix + key, root) for key, value in values.items()})


def check_fields(config: Any, path: str) -> None:
    """Convert every field to its type and raise ConfigError if a value is outside its limits."""
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
                raise unknown(".".join(groups[: i + 1]), list(node), type(config))
            node, kind = node[group], get_type_hints(kind)[group]
        if name not in node:
            raise unknown(path, list(node), type(config))
        node[name] = value
    changed = from_dict(type(config), values)
    check_fields(changed, "")
    return changed
