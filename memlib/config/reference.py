"""The reference of all configuration fields, generated from the dataclasses."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_type_hints

from memlib.config.config import Config
from memlib.config.fields import describe
from memlib.config.files import preset_names, yaml_scalar


def reference(kind: type = Config, path: str = "") -> list[tuple[str, str, str, str]]:
    """(path, type, default, documentation) of every field, in order: what docs/config.md prints."""
    rows = []
    hints = get_type_hints(kind)
    for f in fields(kind):
        here = f"{path}.{f.name}" if path else f.name
        default = getattr(kind(), f.name)
        if is_dataclass(default):
            rows.append((here, "group", "", f.metadata["doc"]))
            rows += reference(hints[f.name], here)
        else:
            rows.append((here, describe(hints[f.name]), yaml_scalar(default), f.metadata["doc"]))
    return rows


def reference_page() -> str:
    """The text of docs/config.md: one table per group of fields."""
    lines = [
        "# Configuration reference",
        "",
        "Written by `make docs` from the dataclasses in `memlib/config/`; do not edit.",
        "A YAML file may set any of these fields; all others keep the default below.",
        "Shipped presets, usable by bare name: " + ", ".join(f"`{name}`" for name in preset_names()) + ".",
    ]
    for path, kind, default, doc in reference():
        if kind == "group":
            lines += [
                "",
                f"## {path}",
                "",
                f"{doc[0].upper()}{doc[1:]}.",
                "",
                "| field | type | default | description |",
            ]
            lines += ["| --- | --- | --- | --- |"]
        else:
            cells = (f"`{path}`", kind, f"`{default}`", doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
