"""Load and save configurations: YAML files, shipped presets, overrides by path."""

from __future__ import annotations

import dataclasses
import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from memlib.config.config import Config
from memlib.config.fields import ConfigError, from_dict
from memlib.files import write_text


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["training.max_steps=10"]` -> `{"training.max_steps": 10}`; values are read as YAML."""
    changes = {}
    for word in words:
        path, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: expected path=value, e.g. training.max_steps=100")
        changes[path] = yaml.safe_load(value)
    return changes


def preset_names() -> list[str]:
    """Names of the configs that ship with the package."""
    folder = resources.files("memlib") / "configs"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a YAML file, or a shipped preset by its bare name (`load_config("recall_internal")`).

    Raises ConfigError for a file that does not exist, does not parse or does not validate.
    """
    file = Path(path)
    if file.suffix not in (".yaml", ".yml") and not file.exists():
        if str(path) not in preset_names():
            raise ConfigError(f"{path}: no such file or preset; presets: {', '.join(preset_names())}")
        text = (resources.files("memlib") / "configs" / f"{path}.yaml").read_text(encoding="utf-8")
    elif not file.is_file():
        raise ConfigError(f"{path}: no such file; presets by bare name: {', '.join(preset_names())}")
    else:
        text = file.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return from_dict(Config, values or {})


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to plain nested dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write all fields as YAML, atomically: an interrupted write leaves the old file unchanged."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def differences(one: Config, other: Config) -> list[tuple[str, str, str]]:
    """(path, value in one, value in the other) of every field that differs, with values in YAML syntax."""
    mine, theirs = flat(to_dict(one)), flat(to_dict(other))
    return [
        (path, yaml_scalar(value), yaml_scalar(theirs[path]))
        for path, value in mine.items()
        if value != theirs[path]
    ]


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries: {"a": {"b": 1}} becomes {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            flat(value, f"{path}{name}.") if isinstance(value, dict) and value else {f"{path}{name}": value}
        )
    return found


def yaml_scalar(value: Any) -> str:
    """A value in YAML syntax, on one line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
