"""The long stream benchmark: are memory and speed constant over a long stream?

The stream is fed call by call, as a service would feed it, and measured in tenths of its length (law L6,
bounded state; docs/coverage.md). Half-way, everything is saved and loaded into a new model, and both
continue. Ids are random and weights untrained: size and speed do not depend on the content.

Axes: b batch (streams), t tokens of a call, v vocabulary.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from memlib.config import Config, IndexConfig
from memlib.inference.states import load_state, save_state
from memlib.memory.external.index import library
from memlib.models import MemoryTransformer
from memlib.models.state import MemoryState
from memlib.models.stores import Stores, attach_stores, save_stores

TENTHS = 10
SLOWEST = 0.9  # least allowed speed of the last tenth, relative to the second tenth
FRESH = 8  # segments of each call that the model without a past is fed
RESIDENT = 16 * 2**20  # bytes by which a process may grow without a leak, because of the allocator


@dataclass(frozen=True)
class StreamResult:
    """Speed and memory by tenth of the stream; sizes in bytes.

    speed: tokens per second of CPU time; fresh: the same for an equal model with an empty state, which is fed
    the first segments of each call alternately, because a busy machine slows both; held: maximum size of
    state and stores after a call; tensors: all tensors created since the start that are alive at the tenth's
    end; resident: memory of the process. resumed: whether the copy loaded half-way gave bitwise equal logits
    for a tenth of the stream. search: index of the stores, empty without stores. tokens: of each of `batch`
    streams; window, call: in tokens.
    """

    name: str
    search: str
    tokens: int
    batch: int
    window: int
    call: int
    cpu_seconds: float
    speed: list[float]
    fresh: list[float]
    held: list[int]
    tensors: list[int]
    resident: list[int]
    resumed: bool

    @property
    def ratio(self) -> float:
        """Speed of the last tenth / speed of the second, each divided by `fresh`; the first is warm-up."""
        return self.speed[-1] / self.fresh[-1] / (self.speed[1] / self.fresh[1])

    def unsteady(self) -> list[str]:
        """What changed over the stream; empty if memory and speed are constant.

        A store grows until it is full, so its size is compared from the second tenth on.
        """
        found = [
            f"{what} grew from {sizes[0]:,} to {max(sizes):,} bytes"
            for what, sizes in (
                ("the state with its stores", self.held[1:] if self.search else self.held),
                ("the sum of all live tensors", self.tensors[1:]),
            )
            if max(sizes) > sizes[0]
        ]
        if (grown := self.resident[-1] - self.resident[1]) > RESIDENT:
            found.append(f"the process grew by {grown:,} bytes (at most {RESIDENT:,})")
        if self.ratio < SLOWEST:
            speed = f"{self.ratio:.2f} of the second tenth's speed, each relative to the fresh model"
            found.append(f"the last tenth ran at {speed} (at least {SLOWEST})")
        if not self.resumed:
            found.append("the copy loaded half-way gave different logits")
        return found


class Run:
    """A model with its stores and its current state in a stream."""

    def __init__(self, model: MemoryTransformer, stores: Stores, state: MemoryState) -> None:
        self.model, self.stores, self.state = model, stores, state

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Read the next ids of the stream and return their logits: [b t] -> [b t v]."""
        output = self.model(ids, memory_state=self.state)
        self.state = output.memory_state
        return output.logits

    @property
    def held(self) -> int:
        """Bytes of the state and the stores."""
        return self.state.nbytes + sum(store.nbytes for store in self.stores.values())

    def reread(self, index: IndexConfig | None) -> Run:
        """Save model, stores and state to files, and load them into a new model."""
        with tempfile.TemporaryDirectory() as folder:
            weights, state, stored = (Path(folder, name) for name in ("weights", "state", "stores"))
            save_model(self.model, str(weights))
            save_state(self.state, state, self.model)
            save_stores(self.stores, stored)
            model = new_model(self.model.config, seed=1)
            load_model(model, str(weights))
            stores = attach_stores(model, stored, index) if self.stores else {}
            return Run(model, stores, load_state(state, model)[0])


def measure_stream(
    config: Config,
    name: str,
    tokens: int = 1_000_000,
    batch: int = 1,
    segments: int = 32,
    search: str = "",
    index: IndexConfig | None = None,
) -> StreamResult:
    """Feed `batch` streams of `tokens` each to an untrained model, `segments` per call.

    The number of tokens is rounded up to whole calls. search, index: keep external memory in stores with
    this index; without them it is in the state. Raises ValueError for fewer than two calls per tenth, and
    for stores without external memory.
    """
    window = config.model.segment_length
    call = segments * window
    calls = -(-tokens // call)
    if calls < 2 * TENTHS:
        raise ValueError(
            f"tokens = {tokens:,}: {calls} calls of {segments} segments of {window}; use at least "
            f"{(2 * TENTHS - 1) * call + 1:,}, or fewer segments per call"
        )
    torch.set_num_threads(config.training.num_threads)
    model = new_model(config)
    stores: Stores = {}
    if search:
        library().omp_set_num_threads(config.training.num_threads)
        stores = attach_stores(model, index=index)
    run, fresh = Run(model, stores, model.init_state(batch)), new_model(config)
    tenths, tensors, resident = [], [], []
    with only_new_objects():
        for tenth in range(TENTHS):
            numbers = range(calls * tenth // TENTHS, calls * (tenth + 1) // TENTHS)
            ids = (token_ids(config, batch, call, number) for number in numbers)
            copy = run.reread(index) if tenth == TENTHS // 2 else None
            tenths.append(measure_calls(run, fresh, copy, ids))
            del copy
            gc.collect()
            tensors.append(tensor_bytes())
            resident.append(resident_bytes())
    return StreamResult(
        name=name,
        search=search,
        tokens=calls * call,
        batch=batch,
        window=window,
        call=call,
        cpu_seconds=round(sum(tenth.seconds for tenth in tenths), 1),
        speed=[round(tenth.tokens / tenth.seconds, 1) for tenth in tenths],
        fresh=[round(tenth.fresh_tokens / tenth.fresh_seconds, 1) for tenth in tenths],
        held=[tenth.held for tenth in tenths],
        tensors=tensors,
        resident=resident,
        resumed=all(tenth.same for tenth in tenths),
    )


@dataclass
class Measured:
    """Totals over several calls: tokens, CPU seconds and sizes; see `StreamResult`."""

    tokens: int = 0
    seconds: float = 0.0
    fresh_tokens: int = 0
    fresh_seconds: float = 0.0
    held: int = 0
    same: bool = True


def measure_calls(run: Run, fresh: MemoryTransformer, copy: Run | None, calls: Iterable[Tensor]) -> Measured:
    """Feed the calls, each [b t], to the run and its copy, and the first part of each to the fresh model."""
    total = Measured()
    part = FRESH * fresh.config.model.segment_length
    for ids in calls:
        before = time.process_time()
        logits = run.feed(ids)
        after = time.process_time()
        with torch.no_grad():
            fresh(ids[:, :part])
        total.fresh_seconds += time.process_time() - after
        total.seconds += after - before
        total.tokens += ids.numel()
        total.fresh_tokens += ids[:, :part].numel()
        total.held = max(total.held, run.held)
        total.same &= copy is None or torch.equal(copy.feed(ids), logits)
    return total


def new_model(config: Config, seed: int = 0) -> MemoryTransformer:
    """An untrained model with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MemoryTransformer(config).eval()


def token_ids(config: Config, batch: int, length: int, number: int) -> Tensor:
    """Reproducible random ids of call `number`: [b t]."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(config.model.vocab_size, (batch, length), generator=generator)


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Temporarily exclude existing objects from garbage collection, so that it is fast."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def tensor_bytes() -> int:
    """Bytes of the live tensors that were created inside `only_new_objects`; shared memory counts once."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(sizes.values())


def resident_bytes() -> int:
    """Resident memory of this process now, or its peak where the system reports no current value."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stream_table(results: Sequence[StreamResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: speed and size of state and stores, by tenth of the stream."""
    head = ["model", "tokens", "window", "CPU-s", "tokens/s, 2nd tenth", "last tenth", "ratio", "over fresh"]
    head += ["held, 1st tenth", "2nd", "last", "process grew by", "resumed"]
    rows = [
        [
            f"{r.name}, {r.search}" if r.search else r.name,
            f"{r.batch} × {r.tokens:,}" if r.batch > 1 else f"{r.tokens:,}",
            f"{r.window}",
            f"{r.cpu_seconds:.0f}",
            f"{r.speed[1]:,.0f}",
            f"{r.speed[-1]:,.0f}",
            f"{r.speed[-1] / r.speed[1]:.2f}",
            f"{r.ratio:.2f}",
            *(f"{r.held[i]:,}" for i in (0, 1, -1)),
            f"{(r.resident[-1] - r.resident[1]) / 2**20:+.1f} MiB",
            "equal logits" if r.resumed else "**different logits**",
        ]
        for r in results
    ]
    return head, rows
