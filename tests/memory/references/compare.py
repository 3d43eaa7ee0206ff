"""Compare a memory with its reference on one stream: reads, states and all gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memlib.memory import MEMORIES
from memlib.memory.base import AttentionHeads
from tests.laws.cases import memory_config, stir

from . import REFERENCES
from .base import Reference

VALUES, GRADIENTS = 1e-10, 1e-8
DIM, TOKENS, SEGMENTS, CUT = 16, 5, 4, 2  # CUT: where a segment's read is cut in two

MASK = torch.tensor(  # segment, row, token: padding left, right and between, and whole segments of it
    [
        [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]],
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    ]
).bool()


def build(kind: str, options: dict[str, Any], training: bool = False) -> tuple[Any, Reference]:
    """A registered memory in float64, its weights random, and its reference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        memory = MEMORIES[kind](memory_config(kind)(**options), DIM).double().train(training)
    return stir(memory, 0.5), reference_of(kind)(memory_config(kind)(**options))


def reference_of(kind: str) -> type[Reference]:
    """The reference of a registered memory."""
    if kind not in REFERENCES:
        raise AssertionError(
            f"memory {kind!r} has no reference: write its equations in tests/memory/references/{kind}.py "
            "and add a line to REFERENCES in tests/memory/references/__init__.py"
        )
    return REFERENCES[kind]


def agree(memory: Any, reference: Reference) -> None:
    """Raise an AssertionError where a memory's reads, states or gradients are not its reference's."""
    stream = Stream(memory)
    mine, mine_states = follow(memory, stream, Implemented())
    want, want_states = follow(memory, stream, reference)
    for segment, (got, true) in enumerate(zip(mine_states, want_states, strict=True)):
        for b, state in enumerate(true):
            theirs, ours = reference.theirs(memory, got, b), reference.named(memory, state)
            same_state(f"state of row {b} after segment {segment}", theirs, ours)
    for segment, (got, true) in enumerate(zip(mine, want, strict=True)):
        same(f"read in segment {segment}", got, true, VALUES)
    weights = [stream.random(*read.shape) for read in mine]
    gradients = [
        torch.autograd.grad(
            sum((weight * read).sum() for weight, read in zip(weights, reads, strict=True)),
            list(stream.inputs.values()),
            allow_unused=True,
        )
        for reads in (mine, want)
    ]
    for (name, tensor), got, true in zip(stream.inputs.items(), *gradients, strict=True):
        got, true = (torch.zeros_like(tensor) if one is None else one for one in (got, true))
        same(f"gradient of {name}", got, true, GRADIENTS)


class Stream:
    """Random inputs of a memory: hidden [b n d] of each segment, and the attention's output there."""

    def __init__(self, memory: Any) -> None:
        self.generator = torch.Generator().manual_seed(2)
        rows, heads = MASK.shape[1], getattr(getattr(memory, "config", None), "num_heads", 1)
        self.hidden = [self.leaf(rows, TOKENS, DIM) for _ in range(SEGMENTS + 1)]
        self.attended = [self.leaf(rows, heads, TOKENS, DIM // heads) for _ in self.hidden]
        self.logsumexp = [self.leaf(rows, heads, TOKENS) for _ in self.hidden]
        self.masks = [*MASK, torch.ones_like(MASK[0])]
        self.inputs = {name: p for name, p in memory.named_parameters() if p.requires_grad}
        for name in ("hidden", "attended", "logsumexp"):
            self.inputs |= {f"{name} of segment {i}": one for i, one in enumerate(getattr(self, name))}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def leaf(self, *shape: int) -> Tensor:
        return self.random(*shape).requires_grad_()


class Implemented:
    """A memory, called as a reference is."""

    def init_state(self, memory: Any, batch: int) -> Any:
        return memory.init_state(batch)

    def read(self, memory: Any, hidden: Tensor, state: Any) -> Tensor:
        return memory.read(hidden, state)

    def mix(self, memory: Any, hidden: Tensor, attended: Tensor, logsumexp: Tensor, state: Any) -> Tensor:
        def unused(tokens: Tensor) -> Any:
            raise AssertionError("the comparison has no projections of a layer: give it some")

        queries = keys = values = torch.full_like(attended, torch.nan)  # of the layer; not compared yet
        heads = AttentionHeads(hidden, queries, keys, values, attended, logsumexp, unused)
        return memory.mix(heads, state)

    def write(self, memory: Any, hidden: Tensor, state: Any, mask: Tensor) -> Any:
        """As the model writes: a row whose segment is all padding keeps its state."""
        return memory.write(hidden, state, mask).where(mask.any(1), state)

    def opened(self, memory: Any, state: Any, hidden: Tensor, mask: Tensor) -> Any:
        return memory.with_open_segment(state, hidden, mask)


def follow(memory: Any, stream: Stream, by: Any) -> tuple[list[Tensor], list[Any]]:
    """The reads of each segment, zero at padding, and the state after it."""
    state, reads, states = by.init_state(memory, MASK.shape[1]), [], []
    parts = zip(stream.hidden, stream.attended, stream.logsumexp, stream.masks, strict=True)
    for hidden, attended, logsumexp, mask in parts:
        said = []
        for piece in (slice(0, CUT), slice(CUT, TOKENS)):
            seen = by.opened(memory, state, hidden[:, : piece.start], mask[:, : piece.stop])
            if memory.in_attention:
                mixed = by.mix(memory, hidden[:, piece], attended[:, :, piece], logsumexp[:, :, piece], seen)
                said.append(mixed.transpose(1, 2).flatten(2))
            else:
                said.append(by.read(memory, hidden[:, piece], seen))
        reads.append(torch.where(mask[..., None], torch.cat(said, 1), 0.0))
        state = by.write(memory, hidden, state, mask)
        states.append(state)
    return reads, states


def same_state(what: str, got: dict[str, Any], want: dict[str, Any]) -> None:
    assert list(got) == list(want), f"{what}: {list(got)}, not {list(want)}"
    for name in want:
        pairs = [(got[name], want[name])]
        if isinstance(want[name], list):
            assert len(got[name]) == len(want[name]), (
                f"{what}: {len(got[name])} of {name}, not {len(want[name])}"
            )
            pairs = list(zip(got[name], want[name], strict=True))
        for mine, true in pairs:
            same(f"{what}: {name}", mine, true, VALUES)


def same(what: str, got: Any, want: Any, within: float) -> None:
    got, want = (torch.as_tensor(one, dtype=torch.float64).detach() for one in (got, want))
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    gap = float((got - want).abs().max()) if got.numel() else 0.0
    assert gap <= within * max(1.0, float(want.abs().max()) if got.numel() else 0.0), (
        f"{what}: differs by {gap:.1e}"
    )
