"""Checkpoints: safetensors and JSON, written atomically, resumed exactly.

A checkpoint is a folder `step-0000500` with tensors of model, optimizer and memory state, and one JSON file.
It is written under a temporary name, flushed to disk and then renamed. A kill at any moment leaves either
the complete new checkpoint or none, and never damages an earlier one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim import Optimizer

from memlib.memory.base import State
from memlib.memory.chapters.quantization import pack_memory_banks

if TYPE_CHECKING:
    from memlib.training.parallel.ranks import Ranks


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file and the remedy."""


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    optimizer: Optimizer | None = None,
    memory_state: State | None = None,
    progress: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder atomically; `progress` is JSON (step, schedule, config, …).

    Raises CheckpointError if it cannot be written, e.g. on a full disk; nothing of it is left then.
    """
    target = Path(path)
    scratch = target.with_name(f".{target.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        write_files(scratch, model, optimizer, memory_state, progress)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise not_written(target, error) from None
    before = target.with_name(f".{target.name}.before.part")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        os.rename(target, before)
    os.rename(scratch, target)
    flush(target.parent)
    shutil.rmtree(before, ignore_errors=True)
    return target


def write_files(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    memory_state: State | None,
    progress: dict[str, Any] | None,
) -> None:
    """Write the files of a checkpoint into a new folder and flush them to disk."""
    folder.mkdir(parents=True)
    save_model(model, str(folder / "model.safetensors"))
    document: dict[str, Any] = {"progress": progress or {}}
    if optimizer is not None:
        tensors, groups = flatten_optimizer(optimizer)
        save_file(tensors, folder / "optimizer.safetensors")
        document["optimizer_groups"] = groups
    if memory_state is not None:
        named = {name: t.contiguous().clone() for name, t in memory_state.named_tensors()}
        save_file(named, folder / "memory.safetensors")
    states, document["random"] = random_state()
    save_file(states, folder / "random.safetensors")
    (folder / "checkpoint.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    for file in (*folder.iterdir(), folder):
        flush(file)


def not_written(target: Path, error: Exception) -> CheckpointError:
    """The error of a save that failed."""
    return CheckpointError(
        f"{target}: cannot be written ({error}); free space there, or continue in another folder. Earlier "
        "checkpoints are complete"
    )


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    restore_random: bool = False,
    ranks: Ranks | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Load a checkpoint into the given model and optimizer; returns its progress and memory tensors, if any.

    ranks: the processes that load it together, each its part; None: this process alone. It may have been
    saved by any number of processes. Raises CheckpointError for an incomplete folder, a damaged file, or
    tensors of another shape. The model may then be partly loaded: build a new one.
    """
    folder = Path(path)
    try:
        document = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        if "files" in document or (ranks is not None and ranks.mesh is not None):
            from memlib.training.parallel.checkpoint import load_shards

            memory = load_shards(folder, document, model, optimizer, restore_random, ranks)
            return document["progress"], memory
        if model is not None:
            load_weights(model, folder / "model.safetensors")
        if optimizer is not None:
            tensors = load_file(folder / "optimizer.safetensors")
            restore_optimizer(optimizer, tensors, document["optimizer_groups"])
        if restore_random:
            restore_random_state(load_file(folder / "random.safetensors"), document["random"])
        file = folder / "memory.safetensors"
        return document["progress"], load_file(file) if file.exists() else None
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: incomplete checkpoint ({Path(error.filename or '').name} is missing); "
            "use latest_checkpoint(run folder)"
        ) from None
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded ({error}); use an earlier checkpoint, or the configuration "
            "it was saved with"
        ) from None


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a model's tensors; if the file holds packed banks, the model's banks are packed first."""
    with safe_open(file, "pt") as stored:
        if any(name.endswith(".quantized") for name in stored.keys()):  # noqa: SIM118, not a mapping
            pack_memory_banks(model)
    load_model(model, file)


def latest_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run; incomplete ones have a temporary name and are ignored."""
    return max(Path(run, "checkpoints").glob("step-*"), default=None)


def prune_checkpoints(run: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and remains of interrupted saves."""
    folder = Path(run, "checkpoints")
    for old in (*sorted(folder.glob("step-*"))[:-keep], *folder.glob(".step-*.part")):
        shutil.rmtree(old)


def flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as named tensors, and its groups as JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if key != "step" and not tensor.ndim and int(index) < len(parameters):
            tensor = tensor.reshape(
                parameters[int(index)].shape
            )  # version 0.1 had parameters without an axis
        state.setdefault(int(index), {})[key] = tensor
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise RuntimeError(f"the optimizer's groups differ: {error}") from None


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every random generator that a run uses, as tensors and JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, gauss_next = random.getstate()
    return tensors, {
        "numpy": [name, int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def restore_random_state(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("cuda.")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    name, position, has_gauss, gauss = document["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = document["python"]
    random.setstate((version, tuple(internal), gauss_next))


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
