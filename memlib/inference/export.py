"""Export: the step of a model as compiled code, for programs without memlib.

`export_model` writes one file, an AOTInductor package (`.pt2`) with machine code, weights and a description.
Python opens it with `torch._inductor.aoti_load_package`, C++ with `AOTIModelPackageLoader`; `examples/export`
has a program in each. The step is a function of flat tensors that reads one segment of each stream:

    logits, *state = step(ids, mask, start, *state)

ids: [b n] int64. mask: [b n] bool, false for padding. start: [b] bool, true for a stream that begins here:
its memory is reset before it reads, whatever values its state has. state: the tensors of the memories, in the
order of `State.named_tensors`. logits: [b n v]; at padding they mean nothing. Logits and state equal those of
`MemoryTransformer.forward` with this mask, up to rounding. A row that is all padding keeps its state.

The open window is not part of the state here. To read a segment before it is full, pad it on the right and
drop the state that comes out; when more tokens are there, read it again from the state before it.

Axes: b rows of the batch, n tokens of a segment (both fixed at export), v vocabulary.
Source: the C++ core of "LTM Transformer Architecture" (docs/coverage.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import memlib
from memlib.config import to_dict
from memlib.memory.state import State
from memlib.models import MemoryTransformer
from memlib.models.eval_mode import eval_mode
from memlib.models.stores import attached_stores

FORMAT = "memlib compiled step 1"
SUFFIX = ".pt2"


class Step(nn.Module):
    """One segment of each row, with the memories' states as flat tensors."""

    def __init__(self, model: MemoryTransformer, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size

    def forward(self, ids: Tensor, mask: Tensor, start: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        fresh, values = self.model.init_state(self.batch_size), iter(state)
        given = replace(fresh, memories=tuple(one.map(lambda _: next(values)) for one in fresh.memories))
        logits, after, _ = self.model.step(ids, mask, self.model.reset(given, start))
        return logits, *(tensor for _, tensor in named(after.memories))


def export_model(model: MemoryTransformer, path: str | os.PathLike[str], batch_size: int = 1) -> Path:
    """Compile a model's step for CPUs like this one, and write it atomically; returns the path.

    path: ends in .pt2. batch_size: number of streams read in parallel. The package says what goes in and
    comes out (`description`), and runs on as many threads as torch has now.

    Raises ValueError for a model that cannot be exported, RuntimeError where there is no C++ compiler.
    """
    target = Path(path)
    check(model, target, batch_size)
    step = Step(model, batch_size)
    with torch.no_grad(), eval_mode(model), warnings.catch_warnings():
        # torch.export meets a deprecation of torch's own.
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
        memories = dict(named(model.init_state(batch_size).memories))
        ids = torch.zeros(batch_size, model.segment_length, dtype=torch.int64)
        first = {"ids": ids, "mask": ids == 0, "start": torch.ones(batch_size, dtype=torch.bool)}
        inputs = first | memories
        outputs = dict(zip(("logits", *memories), step(*inputs.values()), strict=True))
        program = torch.export.export(step, tuple(inputs.values()))
        about = description(model, inputs, outputs)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
            package = torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(Path(scratch, target.name)),
                inductor_configs={"aot_inductor.metadata": about},
            )
            os.replace(package, target)
    return target


def named(memories: Iterable[State]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors of the memories, as `MemoryState.named_tensors` names them."""
    for slot, state in enumerate(memories):
        yield from state.named_tensors(f"memories.{slot}.")


def description(
    model: MemoryTransformer, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> dict[str, str]:
    """The package's metadata, all of them text.

    inputs, outputs: a line for each tensor, in order: name, type and sizes, `mask bool 1 64`. config: the
    options of model and memory as JSON. weights_sha256: of names, types, shapes and bytes of all weights.
    """
    return {
        "format": FORMAT,
        "memlib": memlib.__version__,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "vocab_size": str(model.config.model.vocab_size),
        "inputs": lines(inputs),
        "outputs": lines(outputs),
        "config": json.dumps({"model": to_dict(model.config.model), "memory": to_dict(model.config.memory)}),
        "weights_sha256": weights_sha256(model),
    }


def lines(tensors: dict[str, Tensor]) -> str:
    return "\n".join(
        " ".join([name, str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape)])
        for name, tensor in tensors.items()
    )


def weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def check(model: object, path: Path, batch_size: int) -> None:
    """Refuse what cannot be exported, with the reason and the remedy, before anything is compiled."""
    if not isinstance(model, MemoryTransformer):
        raise ValueError(
            f"a {type(model).__name__} cannot be exported: only the step of a MemoryTransformer, "
            "a model that memlib trains from scratch, is one graph"
        )
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: a package's name ends in {SUFFIX}")
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: must be at least 1")
    if attached_stores(model):
        raise ValueError(
            "a store is attached to the external memory, and its search is not part of the compiled code: "
            "detach_stores(model) exports the model with its pairs in the state, without those of the store"
        )
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device}: packages are float32 and for CPUs; use "
                "model.float().cpu()"
            )
    check_compiler()


def check_compiler() -> None:
    """RuntimeError where AOTInductor finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RuntimeError(
            "no C++ compiler found, and export compiles the model with one: install g++ (Debian and Ubuntu: "
            "apt-get install g++), or name yours in the variable CXX"
        ) from None
