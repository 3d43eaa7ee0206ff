"""Checkpoints of a run on several processes: each writes its shards, any number of processes read them.

A checkpoint is a folder of safetensors files, one for each process, written by torch.distributed.checkpoint,
and `checkpoint.json` with the size and SHA-256 of each. Its tensors are

    model.<name>                    parameters and buffers
    optimizer.<parameter>.<field>   e.g. exp_avg: by name, so that any layout and any stage finds its own
    memory.<name>                   the carried memory of all rows of the batch; empty tensors are left out
    random.<rank>.<generator>       every rank's generators: the same number of processes goes on with them,
                                    another with those of rank 0

Each shard is stored with its place in the whole tensor, so another layout reads what it needs. That includes
the memory: its rows lie on the data-parallel ranks like the rows of the batch. A plain tensor of that name on
every rank would be stored once, and all ranks but one would lose theirs.

The files are written under a temporary name and flushed. When all ranks are done, the first writes
`checkpoint.json` and renames the folder: only complete checkpoints have the name `step-…`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from memlib.config import Config, from_dict
from memlib.memory.base import State
from memlib.models import MemoryTransformer
from memlib.training.checkpoint import (
    CheckpointError,
    flush,
    not_written,
    prune_checkpoints,
    random_state,
    restore_random_state,
)
from memlib.training.optimizer import make_optimizer
from memlib.training.parallel.pipeline import Pipeline
from memlib.training.parallel.ranks import AXES, Ranks

FAILURES = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError)


class Saver:
    """Write a run's checkpoints; in the background, the run goes on with training as soon as it has a copy.

    A save that failed in the background is raised by `wait`, on all processes.
    """

    def __init__(self, ranks: Ranks, background: bool = False) -> None:
        self.ranks = ranks
        self.thread = ThreadPoolExecutor(1) if background and ranks.mesh is not None else None
        self.pending: Future[Path] | None = None

    def save(self, tensors: dict[str, Tensor], progress: dict[str, Any], target: Path, keep: int) -> None:
        """Write a checkpoint of `collect`'s tensors; the newest `keep` of the run stay."""
        self.wait()
        states, document = random_state()
        rank = dist.get_rank()
        tensors = tensors | {f"random.{rank}.{name}": state for name, state in states.items()}
        if self.thread is None:
            write(tensors, progress, document, target, keep, self.ranks)
        else:
            copies = BlockingAsyncStager().stage(tensors)
            self.pending = self.thread.submit(write, copies, progress, document, target, keep, self.ranks)

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed on this process."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Until no save is under way; raises CheckpointError if it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def collect(
    model: nn.Module, optimizer: Optimizer, memory_state: State | None, ranks: Ranks
) -> dict[str, Tensor]:
    """This process's tensors of a checkpoint, not copied."""
    parameters = model_tensors(model)
    names = {id(p): name for name, p in parameters.items()}
    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for p, fields in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(p)]}.{field}": value for field, value in fields.items()}
    if memory_state is not None:
        whole = memory_names(model, [name for name, tensor in memory_state.named_tensors() if tensor.numel()])
        named = dict(memory_state.named_tensors())
        tensors |= {f"memory.{name}": rows_of_all(named[mine], ranks) for name, mine in whole.items()}
    return tensors


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, by their names in the whole model; shards where it is sharded."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # its hooks give gathered weights back
        if isinstance(model, Pipeline):  # parts.<number of the stage>.<name>
            name = name.split(".", 2)[2]
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def memory_names(model: nn.Module, mine: list[str]) -> dict[str, str]:
    """The names of a state's tensors in the whole model -> in this process's part of it.

    A pipeline's process counts the states of its own layers only.
    """
    if not isinstance(model, Pipeline):
        return {name: name for name in mine}
    slots = whole_model(model.config).stack.slots
    number = {
        str(own): str(whole)
        for layer, owns in model.stack.slots.items()
        for own, whole in zip(owns, slots[layer], strict=True)
    }
    parts = [name.split(".", 2) for name in mine]
    return {f"memories.{number[own]}.{rest}": f"memories.{own}.{rest}" for _, own, rest in parts}


def whole_model(config: Config) -> MemoryTransformer:
    """A model without values, for its names."""
    with torch.device("meta"):
        return MemoryTransformer(config)


def rows_of_all(tensor: Tensor, ranks: Ranks) -> Tensor:
    """This rank's rows as a part of the whole batch's."""
    if ranks.mesh is None:
        return tensor
    return DTensor.from_local(
        tensor.contiguous(), ranks.mesh["replicate", "shard"], [Shard(0), Shard(0)], run_check=False
    )


def write(
    tensors: dict[str, Tensor],
    progress: dict[str, Any],
    random_document: dict[str, Any],
    target: Path,
    keep: int,
    ranks: Ranks,
) -> Path:
    """Write a checkpoint folder atomically, together; raises CheckpointError on all if one fails."""
    scratch = target.with_name(f".{target.name}.part")

    def begin() -> None:
        if ranks.main:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

    def store() -> None:
        writer = HuggingFaceStorageWriter(str(scratch), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=ranks.files)

    def describe() -> tuple[dict[str, Any], dict[str, Any]]:
        mine = sorted(scratch.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"))
        for file in mine:
            flush(file)
        return {file.name: fingerprint(file) for file in mine}, random_document

    def finish() -> None:
        if not ranks.main:
            return
        layout = {axis: ranks.size(axis) for axis in AXES}
        files = {name: entry for part, _ in described for name, entry in part.items()}
        document = {"progress": progress, "layout": layout, "random": [r for _, r in described]}
        text = json.dumps(document | {"files": files}, indent=1)
        (scratch / "checkpoint.json").write_text(text, encoding="utf-8")
        for path in (scratch / "checkpoint.json", scratch):
            flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(scratch, target)
        flush(target.parent)
        prune_checkpoints(target.parents[1], keep)

    try:
        together(ranks, begin)
        together(ranks, store)
        described = together(ranks, describe)
        together(ranks, finish)
    except CheckpointError as error:
        if ranks.main:
            shutil.rmtree(scratch, ignore_errors=True)
        raise not_written(target, error) from None
    return target


def together(ranks: Ranks, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each process; raises CheckpointError on all of them if it fails on one."""
    result, failure = None, None
    try:
        result = work()
    except CheckpointException as error:  # torch's report of what failed, by rank
        failure = str(next((cause for cause, _ in error.failures.values()), error))
    except FAILURES as error:
        failure = str(error)
    answers: Any = ranks.gather((result, failure), ranks.files)
    for _, why in answers:
        if why is not None:
            raise CheckpointError(why)
    return [value for value, _ in answers]


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def load_shards(
    folder: Path,
    document: dict[str, Any],
    model: nn.Module | None,
    optimizer: Optimizer | None,
    restore_random: bool,
    ranks: Ranks | None = None,
) -> dict[str, Tensor] | None:
    """Load any checkpoint into this process's part of a model and its optimizer.

    Returns this rank's rows of the memory, if any. Raises CheckpointError on all processes if one cannot.
    """
    ranks = ranks or Ranks(torch.device("cpu"))
    if "files" in document:
        verify(folder, document["files"], ranks)
    stored = Stored(folder, document)
    wanted: dict[str, Tensor] = {}
    if model is not None:
        parameters = model_tensors(model)
        wanted |= {f"model.{name}": p.detach() for name, p in parameters.items()}
        stored.check_complete(wanted, partly=ranks.size("stage") > 1)
        if optimizer is not None:
            wanted |= new_optimizer_state(optimizer, parameters, stored)
    memory: dict[str, Tensor] = {}
    for name, mine in stored.memory_of(model).items():
        rows, *rest = stored.shape(name)
        memory[mine] = torch.empty(
            rows // ranks.data_size, *rest, dtype=stored.dtype(name), device=ranks.device
        )
        wanted[name] = rows_of_all(memory[mine], ranks)
    states, randoms = stored.random_state(ranks)
    together(ranks, lambda: stored.read(wanted | states, ranks))
    if restore_random:
        restore_random_state({name.split(".", 2)[2]: t for name, t in states.items()}, randoms)
    return memory or None


def verify(folder: Path, files: dict[str, dict[str, Any]], ranks: Ranks) -> None:
    """Raise CheckpointError, with the file's name, unless all files are as they were written.

    Each process reads its share of the files.
    """

    def check() -> None:
        everyone = sorted(files.items())
        mine = everyone if ranks.mesh is None else everyone[dist.get_rank() :: dist.get_world_size()]
        for name, entry in mine:
            if not (folder / name).exists():
                raise CheckpointError(f"{name} is missing")
            if fingerprint(folder / name) != entry:
                raise CheckpointError(f"{name} is damaged: it is not what was written")

    together(ranks, check)


def new_optimizer_state(
    optimizer: Optimizer, parameters: dict[str, Tensor], stored: Stored
) -> dict[str, Tensor]:
    """Give an optimizer room for what a checkpoint has of its parameters; returns it by stored name.

    A parameter without stored state keeps none: it had never been updated.
    """
    names = {id(p): name for name, p in parameters.items()}
    fields: dict[str, list[str]] = defaultdict(list)
    for name in stored.names:
        if name.startswith("optimizer."):
            parameter, _, field = name.removeprefix("optimizer.").rpartition(".")
            fields[parameter].append(field)
    room = {}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for p in group["params"]:
            for field in fields[names[id(p)]]:
                name = f"optimizer.{names[id(p)]}.{field}"
                like = torch.zeros_like(p, requires_grad=False)
                optimizer.state[p][field] = like if field != "step" else torch.zeros(())
                room[name] = optimizer.state[p][field]
    return room


class Stored:
    """The tensors of a checkpoint of either form, under the names of the sharded one.

    names: our name -> its name in the files.
    """

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.folder, self.document = folder, document
        self.reader = HuggingFaceStorageReader(str(folder))
        self.found: dict[str, Any] = self.reader.read_metadata().state_dict_metadata
        self.names = {n: n for n in self.found} if "files" in document else self.names_in_folder()

    def names_in_folder(self) -> dict[str, str]:
        """Names for the folder of a run on one process, whose optimizer counts its parameters."""
        names = {}
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118, not a mapping
                names[f"model.{name}"] = name
            for alias, name in (file.metadata() or {}).items():  # of parameters that share a tensor
                if name in self.found:
                    names[f"model.{alias}"] = name
        if (self.folder / "memory.safetensors").exists():
            with safe_open(self.folder / "memory.safetensors", "pt") as file:
                names |= {f"memory.{n}": n for n in file.keys() if 0 not in self.found[n].size}  # noqa: SIM118
        config = from_dict(Config, self.document["progress"]["config"])
        model = whole_model(config)
        whose = {id(p): name for name, p in model.named_parameters()}
        groups = make_optimizer(model, config.training).param_groups
        for index, p in enumerate(p for group in groups for p in group["params"]):
            for field in ("step", "exp_avg", "exp_avg_sq"):
                if f"{index}.{field}" in self.found:
                    names[f"optimizer.{whose[id(p)]}.{field}"] = f"{index}.{field}"
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.found[self.names[name]].size)

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self.found[self.names[name]].properties.dtype
        return dtype

    def memory_of(self, model: nn.Module | None) -> dict[str, str]:
        """The stored memory of this process's layers: name here -> name in its own state."""
        stored = [name.removeprefix("memory.") for name in self.names if name.startswith("memory.")]
        whole = {name: name for name in stored}
        if isinstance(model, Pipeline):
            state = model.init_state(1)
            whole = memory_names(model, [name for name, t in state.named_tensors() if t.numel()])
        return {f"memory.{name}": mine for name, mine in whole.items() if name in stored}

    def check_complete(self, wanted: dict[str, Tensor], partly: bool) -> None:
        """Raise CheckpointError unless the model's tensors are the stored ones, or some of them if partly."""
        for name in wanted:
            if name not in self.names:
                raise CheckpointError(f"{name} is not stored")
        used = {self.names[name] for name in wanted}
        for name, key in self.names.items():
            if name.startswith("model.") and key not in used and not partly:
                raise CheckpointError(f"the model has no {name.removeprefix('model.')}")

    def random_state(self, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Room for the generators' states that this rank goes on with, and the rest of them as JSON."""
        if "files" not in self.document:
            with safe_open(self.folder / "random.safetensors", "pt") as file:
                names = {f"random.0.{name}": name for name in file.keys()}  # noqa: SIM118
            self.names |= names
            rank, document = 0, self.document["random"]
        else:
            same = self.document["layout"] == {axis: ranks.size(axis) for axis in AXES}
            rank = dist.get_rank() if same and ranks.mesh is not None else 0
            document = self.document["random"][rank]
        mine = [name for name in self.names if name.startswith(f"random.{rank}.")]
        return {n: torch.empty(self.shape(n), dtype=self.dtype(n)) for n in mine}, document

    def read(self, wanted: dict[str, Tensor], ranks: Ranks) -> None:
        """Fill tensors, which may be shards, with what is stored under their names."""
        for name, tensor in wanted.items():
            if tuple(tensor.shape) != self.shape(name):
                raise CheckpointError(
                    f"{name} has shape {list(self.shape(name))}, but {list(tensor.shape)} here"
                )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which no_dist says already
            dcp.load(
                {self.names[name]: tensor for name, tensor in wanted.items()},
                storage_reader=self.reader,
                process_group=ranks.files,
                no_dist=ranks.mesh is None,
            )
