"""An adapter's files: what was added to a pretrained model, without the model.

    adapter_config.json, adapter_model.safetensors    LoRA, in PEFT's format
    memory_model.safetensors                          memories; the base's parameters too if they are trained
    memory_config.json                                memlib's configuration, the base's name and a hash of
                                                      its configuration, each file's SHA-256; written last
    README.md                                         a model card

A reader accepts only files whose checksums are those of `memory_config.json`. So an interrupted save leaves
the old adapter, the new one, or one that is refused. Pairs in attached stores are not part of an adapter:
`memlib.models.stores.save_stores` writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save
from torch import Tensor

import memlib
from memlib.config import Config, from_dict, to_dict
from memlib.files import write_bytes
from memlib.memory.chapters.quantization import pack_memory_banks
from memlib.pretrained import peft_files
from memlib.pretrained.extras import extra
from memlib.pretrained.lora import lora_layers
from memlib.pretrained.weights import find

if TYPE_CHECKING:
    from memlib.pretrained.adapter import MemoryAdapter

FORMAT = "memlib adapter 1"
MANIFEST, TENSORS, CARD = "memory_config.json", "memory_model.safetensors", "README.md"
LORA = (peft_files.CONFIG, peft_files.TENSORS)
# Fields of a base's configuration that do not change what its layers compute.
VOLATILE = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "pad_token_id", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def save_adapter(adapter: MemoryAdapter, folder: str | os.PathLike[str]) -> Path:
    """Write what an adapter added; returns the folder. A README.md that is there stays as it is.

    Raises ValueError if the base is trained and LoRA is merged into it.
    """
    target = Path(folder)
    options = adapter.config.adapter
    if options.lora and not options.freeze_base_model and merged(adapter):
        raise ValueError(
            "LoRA is merged into the base, whose parameters are saved because they are trained: call "
            "unmerge_lora_weights(adapter.base) first, else LoRA would be added twice"
        )
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in adapter.added() if ".lora_" not in name
    }
    target.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    if options.lora:
        peft_files.save_lora(adapter.base, target, options.base_model_name)
        names += LORA
    if tensors:
        write_bytes(target / TENSORS, save(tensors, {"format": "pt"}))
        names.append(TENSORS)
    for stale in {*LORA, TENSORS} - set(names):
        (target / stale).unlink(missing_ok=True)
    if not (target / CARD).exists():
        write_bytes(target / CARD, card(adapter).encode())
    document = {
        "format": FORMAT,
        "memlib_version": memlib.__version__,
        "base": {"name": options.base_model_name, **describe_base(adapter.base)},
        "config": to_dict(adapter.config),
        "files": {name: sha256((target / name).read_bytes()) for name in names},
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    document["sha256"] = digest_of(document)
    write_bytes(target / MANIFEST, json.dumps(document, indent=2).encode())
    return target


def load_adapter(
    folder: str | os.PathLike[str], base: Any = None, check_base: bool = True, download: bool = False
) -> MemoryAdapter:
    """Put a saved adapter into a base, in eval mode and with the same values; the base is changed in place.

    folder: a local folder or the name of a repository on the hub, as in `load_base`, which also explains
    download. base: None loads the model that was adapted. check_base: refuse a base whose configuration has
    another hash; its shapes are always checked. Raises ValueError, and leaves the base as it was, for files
    that are missing, damaged or mixed, and for a base that does not fit.
    """
    from memlib.pretrained.adapter import MemoryAdapter
    from memlib.pretrained.fitting import load_named

    path = find(os.fspath(folder), download)
    document, tensors, lora = read_files(path)
    config = from_dict(Config, document["config"])
    if base is None:
        base = load_named(config)
    compare_bases(path, document["base"], base, check_base)
    adapter = MemoryAdapter(config, base)
    try:
        if any(name.endswith(".quantized") for name in tensors):
            pack_memory_banks(adapter)
        fill(adapter, path, tensors, lora)
    except ValueError:
        adapter.detach()
        raise
    return adapter.eval()


def saved_config(folder: str | os.PathLike[str]) -> Config:
    """The configuration of a saved adapter; ValueError for files that are missing, damaged or mixed."""
    return from_dict(Config, read_files(Path(folder))[0]["config"])


# ------------------------------------------------------------------------------------------------- the base


def describe_base(base: Any) -> dict[str, Any]:
    """What tells bases apart: sizes, and the configuration with its hash; weights are not compared."""
    config = {name: value for name, value in base.config.to_dict().items() if name not in VOLATILE}
    config = json.loads(json.dumps(config, default=str))
    return {
        "hidden_size": base.config.hidden_size,
        "num_layers": base.config.num_hidden_layers,
        "config": config,
        "config_sha256": digest_of(config),
    }


def compare_bases(path: Path, saved: dict[str, Any], base: Any, check_hash: bool) -> None:
    """Raise ValueError unless a base has the saved sizes and, if asked for, the saved configuration."""
    found = describe_base(base)
    remedy = f"load it into the base it was trained on, {saved['name']}"
    for size in ("hidden_size", "num_layers"):
        if found[size] != saved[size]:
            raise ValueError(f"{path}: the base has {size} = {found[size]}, expected {saved[size]}; {remedy}")
    if check_hash and found["config_sha256"] != saved["config_sha256"]:
        mine, theirs = found["config"], saved["config"]
        fields = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
        listed = ", ".join(f"{name} = {mine.get(name)!r}, expected {theirs.get(name)!r}" for name in fields)
        raise ValueError(
            f"{path}: the base's configuration has hash {found['config_sha256'][:12]}, expected "
            f"{saved['config_sha256'][:12]} ({listed}); {remedy}, or pass check_base=False"
        )


# ------------------------------------------------------------------------------------------------ the files


def read_files(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """memory_config.json, the tensors beside it, and LoRA's; ValueError unless all checksums agree."""
    manifest = path / MANIFEST
    try:
        document = json.loads(manifest.read_text(encoding="utf-8"))
        kind, checksum = document["format"], document.pop("sha256")
    except FileNotFoundError:
        raise ValueError(
            f"{manifest}: no such file; save_pretrained writes it last, so this is another folder or an "
            "interrupted save"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: damaged ({error}); use another copy") from None
    if kind != FORMAT:
        raise ValueError(f"{manifest}: format {kind!r}, expected {FORMAT!r}; use the memlib that wrote it")
    if digest_of(document) != checksum:
        raise ValueError(f"{manifest}: altered since it was saved (checksum); use another copy")
    parts = {}
    for name, expected in document["files"].items():
        if name not in (*LORA, TENSORS):
            raise ValueError(f"{manifest}: lists {name!r}, which is not part of an adapter; use another copy")
        try:
            parts[name] = (path / name).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{path / name}: no such file; use another copy") from None
        if (found := sha256(parts[name])) != expected:
            raise ValueError(
                f"{path / name}: SHA-256 {found[:12]}, expected {expected[:12]}: damaged, or left by a save "
                "that was interrupted; use another copy or save again"
            )
    tensors, lora = (load(parts[name]) if name in parts else {} for name in (TENSORS, peft_files.TENSORS))
    return document, tensors, lora


def fill(adapter: MemoryAdapter, path: Path, tensors: dict[str, Tensor], lora: dict[str, Tensor]) -> None:
    """Give a new adapter the saved values, in their types; ValueError if names or shapes differ."""
    places = {name: tensor for name, tensor in adapter.added() if ".lora_" not in name}
    matrices = {}
    if adapter.config.adapter.lora:
        for name, layer in lora_layers(adapter.base).items():
            matrices[peft_files.key_of(name, "A")] = layer.lora_A.weight
            matrices[peft_files.key_of(name, "B")] = layer.lora_B.weight
    for file, saved, own in ((TENSORS, tensors, places), (peft_files.TENSORS, lora, matrices)):
        shapes = {name: list(tensor.shape) for name, tensor in own.items()}
        peft_files.check_tensors(saved, shapes, path / file)
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(types) == 1:  # buffers that are not saved follow
        adapter.branches.to(types.pop())
    for saved, own in ((tensors, places), (lora, matrices)):
        for name, tensor in own.items():
            tensor.data = saved[name].to(tensor.device)


def merged(adapter: MemoryAdapter) -> bool:
    return any(layer.merged for layer in lora_layers(adapter.base).values())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of(document: dict[str, Any]) -> str:
    """The SHA-256 of a JSON document, whatever the order of its keys."""
    return sha256(json.dumps(document, sort_keys=True).encode())


# --------------------------------------------------------------------------------------------- the model card


def card(adapter: MemoryAdapter) -> str:
    """A model card: the base and its licence if that is known, what was added, and how to load it."""
    options, memory = adapter.config.adapter, adapter.config.memory
    name, licence = options.base_model_name, licence_of(adapter.base)
    count = sum(tensor.numel() for _, tensor in adapter.added())
    added = []
    if adapter.stack.layers:
        layers = ", ".join(map(str, adapter.stack.layers))
        added.append(
            f"- memories ({', '.join(memory.kinds)}) after layers {layers}, width {adapter.width}, segments "
            f"of {adapter.segment_length} tokens, mode `{options.mode}`"
        )
    if options.lora:
        targets = ", ".join(options.lora_targets)
        added.append(f"- LoRA, rank {options.lora_rank}, in {targets} (PEFT's format)")
    if not options.freeze_base_model:
        added.append("- the base's own parameters, which were trained too")
    header = ["base_model: " + json.dumps(name), *([f"license: {licence}"] if licence else [])]
    return "\n".join(
        [
            "---",
            *header,
            "library_name: memlib",
            "tags: [memlib, memory]",
            "---",
            "",
            f"# Memory adapter for {name}",
            "",
            f"Base model: {name}. Its licence: {licence or 'not known here; see the base model'}.",
            "",
            f"Added, {count:,} values in all:",
            "",
            *added,
            "",
            "The files hold what was added, not the base model. Load them with",
            "",
            "```python",
            "from memlib.pretrained.adapter import MemoryAdapter",
            "",
            'adapter = MemoryAdapter.from_pretrained("this folder")',
            "```",
            "",
        ]
    )


def licence_of(base: Any) -> str | None:
    """The licence in the model card beside a base's files, in a folder or in the hub's local cache."""
    name = base.config.name_or_path
    beside = Path(name, CARD)
    if name and not beside.is_file() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        cached = extra("huggingface_hub").try_to_load_from_cache(name, CARD)
        beside = Path(cached) if isinstance(cached, str) else beside
    if not name or not beside.is_file():
        return None
    found = re.search(r"^license:[ ]*([\w.-]+)[ ]*$", beside.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None
