"""The cache of fetched models: where it is, and whether a model in it is complete.

    ~/.cache/memlib/models/smollm2-135m-instruct/    MEMLIB_CACHE replaces ~/.cache/memlib
        model.safetensors  config.json  tokenizer.json  chat_template.jinja  LICENSE  …
        manifest.json      the source, and the size and SHA-256 of each file

`memlib.pretrained.fetch` writes it. This file imports only the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FORMAT = "memlib-model-1"
MANIFEST = "manifest.json"
REMEDY = "`make model` fetches it"


class WeightsError(OSError):
    """Weights or a tokenizer that are missing, damaged or out of reach; the message names the remedy."""


def model_folder(name: str) -> Path:
    """The cache folder of a model; it need not exist."""
    root = Path(os.environ.get("MEMLIB_CACHE") or "~/.cache/memlib").expanduser()
    return root / "models" / name


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of each file in a folder, by name."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in folder.iterdir()}


def check_model(folder: Path, checksums: bool = False) -> dict[str, Any]:
    """Compare a cached model with its manifest; returns the manifest.

    Sizes are compared always, checksums only on request: 540 MB take about half a second.

    Raises WeightsError for a folder, manifest or file that is missing or damaged.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such model in the cache; {REMEDY}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder / MANIFEST}: missing or damaged ({error}); {REMEDY} anew") from error
    if not known:
        raise WeightsError(f"{folder}: its format is not {FORMAT}; {REMEDY} anew")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path}: missing; {REMEDY} anew")
        if (found := path.stat().st_size) != size:
            raise WeightsError(f"{path}: {found} bytes, not {size}: truncated or extended; {REMEDY} anew")
        if checksums and digest(path) != sha256:
            raise WeightsError(f"{path}: altered since it was written (checksum); {REMEDY} anew")
    return manifest


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
