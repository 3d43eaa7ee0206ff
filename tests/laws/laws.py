"""The laws L1-L6, each as a function that raises an AssertionError where a model breaks it.

A law takes `make`, which gives a model and, at the next call, another of the same weights; most take a
`Feeding` too: how long the stream is and how it is cut into calls. Real models and the mutants of
test_mutants.py go through the same functions. What should be equal is equal within `TIGHT` of a model's type.

A forward pass here costs its operations, not its numbers: rows side by side are almost free. So what
several laws compare with is run once for each `make` and feeding (`run_batch`, `stop`) and never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from memlib.config import Config, override
from memlib.memory import Memory, State
from memlib.models import MemoryState, MemoryTransformer
from memlib.tasks import Batch
from memlib.training.trainer import Trainer

from .cases import BATCH, SEGMENT, VOCAB, Case, carries, stir, without_memory

TIGHT = {torch.float64: 1e-10, torch.float32: 2e-5}
EXACT = 0.0
LONG = 40  # segments of a long stream
SCALES = (1e-3, 1.0, 1e3)  # of the inputs to a long stream, a row each
STIRRED = ((1, 0.0), (2, 1.0), (3, 10.0))  # seed and size of the noise on a long stream's weights

Make = Callable[[], MemoryTransformer]


@dataclass(frozen=True)
class Feeding:
    """A stream of some tokens, given to the model in pieces of these lengths."""

    name: str
    pieces: tuple[int, ...]
    padded: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def tokens(self) -> int:
        return sum(self.pieces)

    @property
    def cut(self) -> int:
        """Where laws that stop in between stop: inside a segment, or at the end of one if there are many."""
        return 2 * self.tokens // 3

    def mask(self) -> Tensor | None:
        """One row whole, one padded on the left, one on the right: of its second segment nothing is real."""
        if not self.padded:
            return None
        mask = torch.ones(BATCH, self.tokens, dtype=torch.int64)
        mask[1, :2] = 0
        mask[2, SEGMENT - 1 :] = 0
        return mask


FEEDINGS = [
    Feeding("one_segment", (SEGMENT,)),
    Feeding("many_segments", (3 * SEGMENT,)),
    Feeding("ragged", (SEGMENT - 1, 2 * SEGMENT - 2, 1)),
    Feeding("padded", (SEGMENT + 1, SEGMENT + 1), padded=True),
    Feeding("token_by_token", (1,) * (2 * SEGMENT)),
]
MANY, PIECES = FEEDINGS[1], FEEDINGS[2]


def stream(feeding: Feeding, seed: int = 0) -> Tensor:
    """Random token ids: [b t]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (BATCH, feeding.tokens), generator=generator)


@torch.inference_mode()
def feed(
    model: MemoryTransformer,
    tokens: Tensor,
    pieces: Sequence[int] | None = None,
    mask: Tensor | None = None,
    state: MemoryState | None = None,
) -> tuple[Tensor, MemoryState]:
    """Give a stream to a model in pieces (by default in one call): its logits [b t v] and last state."""
    lengths = list(pieces or [tokens.shape[1]])
    logits = []
    for piece, piece_mask in zip(tokens.split(lengths, 1), split(mask, lengths), strict=True):
        output = model(piece, piece_mask, memory_state=state)
        logits.append(output.logits)
        state = output.memory_state
    return torch.cat(logits, 1), state


def split(mask: Tensor | None, lengths: Sequence[int]) -> Sequence[Tensor | None]:
    """A mask [b t] in pieces of these lengths; None for each where there is none."""
    return [None] * len(lengths) if mask is None else mask.split(list(lengths), 1)


def same(law: str, what: str, got: Tensor, want: Tensor, within: float | None = None) -> None:
    """Raise unless two tensors are equal; a difference that is not a number counts as one.

    within: by default `TIGHT` of the tensors' type; integers must be equal.
    """
    within = TIGHT.get(got.dtype, EXACT) if within is None else within
    if got.shape != want.shape:
        raise AssertionError(f"{law}: {what}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
    if not got.numel():
        return
    gap = float((got.double() - want.double()).abs().max())
    if not gap <= within:
        raise AssertionError(f"{law}: {what}: differs by {gap:.1e}")


def same_state(law: str, what: str, got: State, want: State, within: float | None = None) -> None:
    """Raise unless two states have the same tensors by the same names."""
    mine, theirs = dict(got.named_tensors()), dict(want.named_tensors())
    if list(mine) != list(theirs):
        raise AssertionError(f"{law}: {what}: tensors {list(mine)}, not {list(theirs)}")
    for name in mine:
        same(law, f"{what}: {name}", mine[name], theirs[name], within)


def differs(law: str, what: str, got: Tensor, want: Tensor) -> None:
    """Raise if two tensors are equal: a law that nothing could break proves nothing."""
    if torch.equal(got, want):
        raise AssertionError(f"{law}: {what}")


@dataclass(frozen=True)
class Run:
    """Outputs for one stream, run beside other rows in one batch, in the pieces of its feeding.

    logits, state: of the stream; other: logits of another stream; futures: logits of the stream
    changed after a place, by place. sizes: after each piece, the tokens of the open window and the
    state's bytes a row.
    """

    logits: Tensor
    state: MemoryState
    other: Tensor
    futures: dict[int, Tensor]
    sizes: list[tuple[int, float]]


@cache
def run_batch(make: Make, feeding: Feeding) -> Run:
    """Run a new model on a stream, another one and all changed futures of law L1, as one batch."""
    model, tokens, t = make(), stream(feeding), feeding.tokens
    mask = torch.ones_like(tokens) if feeding.mask() is None else feeding.mask()
    changed = (tokens + 1 + stream(feeding, seed=1) % (VOCAB - 1)) % VOCAB
    places = {0, SEGMENT - 2, SEGMENT - 1, SEGMENT, 2 * SEGMENT - 1, t - 2}
    places = sorted(place for place in places if place <= t - 2)
    after = [torch.arange(t) > place for place in places]
    rows = torch.cat([tokens, stream(feeding, 1), *(torch.where(late, changed, tokens) for late in after)])
    masks = torch.cat([mask, mask, *(torch.where(late, 1 - mask, mask) for late in after)])
    state, logits, sizes = None, [], []
    pieces = zip(rows.split(feeding.pieces, 1), masks.split(feeding.pieces, 1), strict=True)
    for piece, piece_mask in pieces:
        said, state = feed(model, piece, None, piece_mask if feeding.padded else None, state)
        logits.append(said)
        sizes.append((state.window.length, state.nbytes / len(rows)))
    first, other, *futures = torch.cat(logits, 1).split(BATCH)
    own = state.rows(torch.arange(BATCH))
    return Run(first, own, other, dict(zip(places, futures, strict=True)), sizes)


@dataclass(frozen=True)
class Stopped:
    """A stream that is stopped at its feeding's `cut` and continued.

    model: the model; state: the state at the cut, copy: a copy made before it was used; rest, mask: the
    remaining tokens, with their logits and the last state.
    """

    model: MemoryTransformer
    state: MemoryState
    copy: MemoryState
    rest: Tensor
    mask: Tensor | None
    logits: Tensor
    last: MemoryState


@cache
def stop(make: Make, feeding: Feeding) -> Stopped:
    """Run a new model on a stream in two calls, and keep the state in between."""
    model, halves = make(), (feeding.cut, feeding.tokens - feeding.cut)
    (first, rest), masks = stream(feeding).split(halves, 1), split(feeding.mask(), halves)
    _, state = feed(model, first, None, masks[0])
    copy = state.clone()
    logits, last = feed(model, rest, None, masks[1], state)
    return Stopped(model, state, copy, rest, masks[1], logits, last)


def causality(make: Make, feeding: Feeding) -> None:
    """L1: changing tokens or padding after position t does not change the logits up to t."""
    law, run = "L1 causality", run_batch(make, feeding)
    for place, other in run.futures.items():
        same(law, f"logits up to {place}", other[:, : place + 1], run.logits[:, : place + 1])
        differs(law, f"logits after {place} ignore their own tokens", other, run.logits)


def explicit_state(make: Make, feeding: Feeding) -> None:
    """L2: the state passed in and returned is all a model remembers, and is never changed in place."""
    law, model, run = "L2 explicit state", make(), run_batch(make, feeding)
    streams = [stream(feeding), stream(feeding, seed=1)]
    turns = in_turns([model, model], streams, feeding.pieces, feeding.mask())
    for i, alone in enumerate((run.logits, run.other)):
        same(law, f"stream {i} of two that go through one model in turns", turns[i], alone)

    stopped = stop(make, feeding)
    state, rest, mask, want = stopped.state, stopped.rest, stopped.mask, stopped.logits
    same_state(law, "the state that was passed in", state, stopped.copy, EXACT)
    again, _ = feed(stopped.model, rest, None, mask, state)
    same(law, "going on from the same state a second time", again, want, EXACT)
    saved = load(save({name: tensor.contiguous().clone() for name, tensor in state.named_tensors()}))
    twin = make()
    restored = twin.init_state(BATCH).load(saved)
    again, _ = feed(twin, rest, None, mask, restored)
    same(law, "going on from a saved state in another model of the same weights", again, want, EXACT)


def separate_models(make: Make) -> None:
    """L2: two models of one process share no parameter, no buffer and nothing they have read."""

    def tensors(model: MemoryTransformer) -> list[Tensor]:
        state = model.init_state(BATCH)
        return [*model.parameters(), *model.buffers(), *(tensor for _, tensor in state.named_tensors())]

    first, second = make(), make()
    mine, theirs = tensors(first), tensors(second)
    places = {tensor.untyped_storage().data_ptr() for tensor in mine if tensor.numel()}
    if common := sum(t.untyped_storage().data_ptr() in places for t in theirs if t.numel()):
        raise AssertionError(f"L2 explicit state: two models share {common} tensors")
    streams, run = [stream(MANY), stream(MANY, seed=1)], run_batch(make, MANY)
    alone = [run.logits, run.other]
    for i, turn in enumerate(in_turns([first, second], streams, MANY.pieces)):
        same("L2 explicit state", f"stream {i} of two that go through two models in turns", turn, alone[i])


def in_turns(
    models: list[MemoryTransformer],
    streams: list[Tensor],
    pieces: Sequence[int],
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Logits of several streams, of which each in turn gets its next piece, and at most a segment."""
    logits: list[list[Tensor]] = [[] for _ in streams]
    states: list[MemoryState | None] = [None for _ in streams]
    cuts = {*accumulate(pieces), *range(SEGMENT, sum(pieces), SEGMENT)}
    for start, stop in pairwise([0, *sorted(cuts)]):
        for i, model in enumerate(models):
            part = slice(start, stop)
            real = None if mask is None else mask[:, part]
            said, states[i] = feed(model, streams[i][:, part], None, real, states[i])
            logits[i].append(said)
    return [torch.cat(said, 1) for said in logits]


def isolation(make: Make, feeding: Feeding) -> None:
    """L3: rows never mix: a row has the same logits and state whatever the others are, in any order."""
    law, tokens, mask, run = "L3 isolation", stream(feeding), feeding.mask(), run_batch(make, feeding)
    mixes = (([2, 0, 1], [0]), ([1, 2, 0], [1, 2]))  # an order, and which rows say something else
    batches = []
    for order, rows in mixes:
        changed = tokens.clone()
        changed[rows] = (changed[rows] + 1) % VOCAB
        batches.append(changed[order])
    masks = None if mask is None else torch.cat([mask[order] for order, _ in mixes])
    got, got_state = feed(make(), torch.cat(batches), feeding.pieces, masks)
    for i, (order, rows) in enumerate(mixes):
        others = [row for row in order if row not in rows]
        places = torch.tensor([BATCH * i + order.index(row) for row in others])
        same(law, f"logits beside rows {rows}, in another order", got[places], run.logits[others])
        mine, theirs = got_state.rows(places), run.state.rows(torch.tensor(others))
        same_state(law, f"state beside rows {rows}, in another order", mine, theirs)
        places = [BATCH * i + order.index(row) for row in rows]
        differs(law, f"rows {rows} ignore their own tokens", got[places], run.logits[rows])


def forgetting(make: Make, feeding: Feeding) -> None:
    """L3: a row that is reset goes on like a new stream, also inside a segment; the others like before.

    Inside a segment of which p tokens were read, a new stream is one with p tokens of padding first.
    """
    law, row, stopped = "L3 reset", 1, stop(make, feeding)
    model, rest, mask = stopped.model, stopped.rest, stopped.mask
    kept, kept_state = stopped.logits, stopped.last
    reset = model.reset(stopped.state, torch.arange(BATCH) == row)
    got, got_state = feed(model, rest, None, mask, reset)
    others = torch.tensor([r for r in range(BATCH) if r != row])
    same(law, "logits of the other rows", got[others], kept[others])
    same_state(law, "state of the other rows", got_state.rows(others), kept_state.rows(others))

    read = stopped.state.window.length
    if read or carries(model.config):
        differs(law, "a reset changes nothing", got[row], kept[row])
    padding = torch.zeros(BATCH, read, dtype=torch.int64)
    new_mask = torch.cat((padding, torch.ones_like(rest) if mask is None else mask), 1)
    new, new_state = feed(model, torch.cat((padding, rest), 1), None, new_mask)
    same(law, "logits of the row, against a new stream", got[row], new[row, read:])
    index = torch.tensor([row])
    mine, theirs = replace(got_state, window=new_state.window).rows(index), new_state.rows(index)
    same_state(law, "memory of the row, against a new stream", mine, theirs)


def segmentation(make: Make, feeding: Feeding) -> None:
    """L4: a stream in one call, in segments and in any pieces: the same logits and the same state."""
    law, model, tokens, t = "L4 segmentation", make(), stream(feeding), feeding.tokens

    def said_in(pieces: tuple[int, ...]) -> tuple[Tensor, MemoryState]:
        if pieces == feeding.pieces:
            run = run_batch(make, feeding)
            return run.logits, run.state
        return feed(model, tokens, pieces, feeding.mask())

    want, state = said_in((t,))
    segments = tuple(min(SEGMENT, t - start) for start in range(0, t, SEGMENT))
    for pieces in sorted({feeding.pieces, segments, (1, t - 2, 1)} - {(t,)}):
        got, got_state = said_in(pieces)
        same(law, f"logits in pieces of {pieces}", got, want)
        same_state(law, f"state after pieces of {pieces}", got_state, state)


def padding(make: Make) -> None:
    """L4: padding leaves no trace: not in the logits of real tokens, not in what is remembered."""
    law, model, tokens = "L4 padding", make(), stream(PIECES)
    lengths = torch.tensor([tokens.shape[1], SEGMENT + 2, 3])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    together, _ = feed(model, tokens, None, mask)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = feed(model, tokens[row : row + 1, :length])
        same(law, f"a row of {length} tokens beside longer ones", together[row, :length], alone[0])

    real = SEGMENT - 2
    left, right = (torch.ones(BATCH, SEGMENT, dtype=torch.int64) for _ in range(2))
    left[1, :2], right[1, real:] = 0, 0
    at_right = tokens[:, :SEGMENT]
    at_left = at_right.clone()
    at_left[1, 2:] = at_right[1, :real]
    at_left[1, :2] = (at_right[1, real:] + 1) % VOCAB
    before, state_left = feed(model, at_left, None, left)
    after, state_right = feed(model, at_right, None, right)
    same(law, "logits with padding on the left, against the right", before[1, 2:], after[1, :real])
    for mine, theirs in zip(state_left.memories, state_right.memories, strict=True):
        same_state(law, "memory after padding on the left, against the right", mine, theirs)

    asleep = torch.ones(BATCH, SEGMENT, dtype=torch.int64)
    asleep[1] = 0
    _, state = feed(model, tokens[:, SEGMENT : 2 * SEGMENT], None, asleep, state_right)
    for mine, theirs in zip(state.memories, state_right.memories, strict=True):
        index = torch.tensor([1])
        same_state(law, "memory after a segment of padding", mine.rows(index), theirs.rows(index), EXACT)


def documents(make: Make) -> None:
    """L3: documents that begin and end inside a row are read as if each were alone.

    A row holds several, each from a segment's border, with padding up to the next one's; in one call, and in
    two that meet inside a segment. No gradient crosses a border either.
    """
    law, model, early = "L3 documents", make(), 0
    lanes = ((SEGMENT, SEGMENT - 2, 2 * SEGMENT), (3, 2 * SEGMENT, SEGMENT - 1), (4 * SEGMENT,))
    total = max(sum(-(-length // SEGMENT) for length in lane) for lane in lanes)
    tokens = 1 + stream(Feeding("lanes", (total * SEGMENT,))) % (VOCAB - 1)
    mask = torch.zeros_like(tokens)
    fresh = torch.zeros(len(lanes), total, dtype=torch.bool)
    places = []  # row, first token, length
    for row, lane in enumerate(lanes):
        first = 0
        for length in lane:
            places.append((row, first, length))
            mask[row, first : first + length], fresh[row, first // SEGMENT] = 1, True
            first += -(-length // SEGMENT) * SEGMENT
    assert first == total * SEGMENT  # the last row ends with its document
    alone_ids, alone_mask = torch.zeros(2, len(places), total * SEGMENT, dtype=torch.int64)
    for i, (row, first, length) in enumerate(places):
        alone_ids[i, :length], alone_mask[i, :length] = tokens[row, first : first + length], 1
    alone, alone_state = feed(model, alone_ids, None, alone_mask)
    lasts = torch.tensor(
        [i for i, place in enumerate(places) if i + 1 == len(places) or not places[i + 1][1]]
    )
    for pieces in ((total * SEGMENT,), (SEGMENT + 2, (total - 1) * SEGMENT - 2)):
        got, state, begun = [], None, 0
        for piece, piece_mask in zip(tokens.split(pieces, 1), mask.split(pieces, 1), strict=True):
            count = -(-(sum(part.shape[1] for part in got) + piece.shape[1]) // SEGMENT) - begun
            with torch.inference_mode():
                output = model(piece, piece_mask, memory_state=state, fresh=fresh[:, begun : begun + count])
            state, begun = output.memory_state, begun + count
            got.append(output.logits)
        logits = torch.cat(got, 1)
        for i, (row, first, length) in enumerate(places):
            what = f"the {length} tokens from {first} of row {row}, in {len(pieces)} calls"
            same(law, what, logits[row, first : first + length], alone[i, :length])
        same_state(law, f"state after {len(pieces)} calls", state, alone_state.rows(lasts))

    row, first, _ = places[2]
    ids = tokens[row : row + 1].clone()
    ids[0, :first:2] = early
    for border in (True, False):
        output = model(ids, mask[row : row + 1], fresh=fresh[row : row + 1] if border else None)
        loss = F.cross_entropy(output.logits[0, first:], ids[0, first:])
        (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
        if bool(gradient[early].any()) != (not border and carries(model.config)):
            raise AssertionError(
                f"{law}: gradient of an earlier document's token is {'not ' * border}zero "
                f"{'across' if border else 'without'} a border"
            )


@cache
def plainly(plain: MemoryTransformer, feeding: Feeding) -> Tensor:
    """The logits of a model without memory, which stays as it is."""
    return feed(plain, stream(feeding), feeding.pieces, feeding.mask())[0]


def off(remembering: MemoryTransformer, plain: MemoryTransformer, feeding: Feeding) -> None:
    """L5: a memory that is off leaves the plain transformer of the same weights, bit for bit.

    The model with memory takes the plain model's weights.
    """
    unknown = remembering.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    if unknown:
        raise AssertionError(f"L5 off means off: no place for the plain model's {unknown}")
    got, _ = feed(remembering, stream(feeding), feeding.pieces, feeding.mask())
    same("L5 off means off", "logits", got, plainly(plain, feeding), EXACT)


def bounded(make: Make, feeding: Feeding) -> None:
    """L6: the state has one size at every end of a segment, and never outgrows a segment left open."""
    law, model, run = "L6 bounded", make(), run_batch(make, feeding)
    size = model.init_state(BATCH).nbytes / BATCH
    almost = feed(model, stream(feeding)[:, : SEGMENT - 1])[1].nbytes / BATCH
    for length, bytes_ in run.sizes:
        if not length and bytes_ != size:
            raise AssertionError(f"{law}: {bytes_} bytes a row at the end of a segment, not {size}")
        if bytes_ > almost:
            raise AssertionError(f"{law}: {bytes_} bytes a row, above an open segment's {almost}")


def endless(make: Make) -> None:
    """L6: after a long stream of inputs of any size the state has the size it began with, and is finite.

    Rows have inputs of the sizes in `SCALES`. The weights are the model's own, then moved further and further
    off them: a write that only shrinks with the weights it starts with would pass otherwise. In float32,
    where growth by 1.8 a token is infinite before the stream ends.
    """
    for seed, size in STIRRED:
        model = deepcopy(make()).float()
        if size:
            stir(model, size, seed)
        logits, state = feed(model, scaled(model))
        start = model.init_state(BATCH)
        if state.nbytes != start.nbytes:
            raise AssertionError(
                f"L6 bounded: {state.nbytes} bytes after {LONG} segments, not {start.nbytes}"
            )
        for name, tensor in [("logits", logits), *state.named_tensors()]:
            if not torch.isfinite(tensor).all():
                raise AssertionError(
                    f"L6 bounded: {name} is not finite after {LONG} segments, weights moved by {size}"
                )


@torch.no_grad()
def scaled(model: MemoryTransformer) -> Tensor:
    """A long stream in which each row has ids of its own, with embeddings of one of `SCALES`: [b t]."""
    each = VOCAB // len(SCALES)
    for row, scale in enumerate(SCALES):
        model.embedding.weight[row * each : (row + 1) * each] *= scale
    first = each * torch.arange(len(SCALES)) % VOCAB
    return stream(Feeding("long", (LONG * SEGMENT,)))[: len(SCALES)] % each + first[:, None]


def truncation(make: Make) -> None:
    """Truncated backpropagation: no gradient passes a detached state, and without it one does."""
    law, model, early = "truncation", make(), 0
    for read in (0, 2):
        cut = SEGMENT + read
        tokens = 1 + stream(MANY) % (VOCAB - 1)
        tokens[:, [1, cut - 1]] = early
        state = model(tokens[:, :cut]).memory_state
        logits = []
        for detach in (True, False):  # the graph behind the state is used up by the last
            output = model(tokens[:, cut:], memory_state=state.detach() if detach else state)
            loss = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, cut:].flatten())
            (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
            reaches = bool(gradient[early].any())
            if reaches != (not detach and (read > 0 or carries(model.config))):
                raise AssertionError(
                    f"{law}: gradient of an earlier call's token is {'not ' * reaches}zero "
                    f"{'after' if detach else 'without'} detach, {read} tokens into a segment"
                )
            logits.append(output.logits)
        same(law, "logits after detach", *(one.detach() for one in logits), EXACT)


def horizon(make: Callable[[Config], Trainer], case: Case) -> None:
    """Truncated backpropagation in training: gradients go back `horizon` segments and no further.

    Without a horizon they reach the first segment, unless the memory carries nothing.
    """
    n, segments, vocab, early = 6, 3, 64, 0
    size = {"model.segment_length": n, "model.vocab_size": vocab, "task.segments": segments}
    tokens = 1 + torch.randint(vocab - 1, (BATCH, segments * n), generator=torch.Generator().manual_seed(0))
    tokens[:, 2] = early
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    scored[:, -n:] = True
    batch = Batch(tokens, tokens.roll(-1, 1), scored, torch.ones(BATCH, dtype=torch.bool))
    for limit in (1, 2, None):
        options = {"task.recall.num_pairs": 1, "training.horizon": limit}
        trainer = make(override(case.config(), size | options))
        stir(trainer.model)
        trainer.backward(batch, trainer.task, int(scored.sum()))
        reaches = bool(trainer.model.embedding.weight.grad[early].any())
        if reaches != (limit is None and carries(trainer.config, training=True)):
            raise AssertionError(
                f"horizon: with horizon = {limit} of {segments} segments the gradient of a token of "
                f"the first segment is {'not ' * reaches}zero"
            )


@torch.no_grad()
def overflow(memory: Memory, capacity: int, dim: int) -> None:
    """L6: of a memory that keeps items, the newest `capacity` are recalled, each with its own value.

    Items come in chunks that do not divide the capacity: that is where offsets go wrong.
    """
    generator = torch.Generator().manual_seed(0)
    chunk = capacity // 2 - 1
    items = F.normalize(
        torch.randn(BATCH, 4 * capacity, dim, generator=generator, dtype=torch.float64), dim=-1
    )
    state, alone = memory.init_state(BATCH), []
    everything = torch.ones(BATCH, chunk, dtype=torch.bool)
    for start in range(0, 4 * capacity - chunk + 1, chunk):
        for i in range(start, start + chunk):
            only = memory.write(items[:, i : i + 1], memory.init_state(BATCH), everything[:, :1])
            alone.append(memory.read(items[:, i : i + 1], only))
        state = memory.write(items[:, start : start + chunk], state, everything)
        newest = slice(max(0, start + chunk - capacity), start + chunk)
        got = memory.read(items[:, newest], state)
        want = torch.cat(alone[newest], 1)
        same("L6 overflow", f"the newest items after {start + chunk} writes", got, want, 1e-6)


LAWS: dict[str, Callable[[Make, Feeding], None]] = {
    "L1_causality": causality,
    "L2_explicit_state": explicit_state,
    "L3_isolation": isolation,
    "L3_reset": forgetting,
    "L4_segmentation": segmentation,
    "L6_bounded": bounded,
}


def every_law(case: Case, feedings: Sequence[Feeding] = FEEDINGS) -> None:
    """All that holds for a case by itself; AssertionError names the law that fails."""
    for feeding in feedings:
        for law in LAWS.values():
            law(case.build, feeding)
    padding(case.build)
    documents(case.build)
    truncation(case.build)
    endless(case.build)
    model = case.build()
    model.close_memory()
    off(model, without_memory(case).fresh(), MANY)
