"""Measures of a memory from a recording, as numpy arrays: writes, reads, and the origin of what is read.

Axes: n tokens of the stream (u another token, the writer), s slots, t segments (one write each), m tokens of
a segment, b batch, c chapters, i banks, l layers, h heads, j hits. `layer` is an index into the layers in
which a point was recorded; `row` is one stream of the batch.
"""

from __future__ import annotations

import numpy as np
from einops import einsum, rearrange, reduce, repeat

from memlib.lab.trace import Trace, TraceError


def per_token(trace: Trace, name: str, row: int = 0, layer: int = 0) -> np.ndarray:
    """A point as one value per token: [n]; other axes are averaged, and a value per write is repeated for all
    tokens of its segment."""
    values = trace[name].at(layer=layer, batch=row)
    time = "token" if "token" in values.axes else "step"
    for axis in values.axes:
        if axis != time:
            values = values.mean(axis)
    if time == "token":
        return values.values
    return np.repeat(values.values, stream_length(trace) // len(values.values))


def stream_length(trace: Trace) -> int:
    return trace["tokens"].sizes["token"]


def read_weight(trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0) -> np.ndarray:
    """The weight of each slot in each token's read: [n s], each row sums to 1.

    A memory that reads by content records its weights in its attention (`reader.attention.weight`).
    """
    by_content = f"{memory}.reader.attention.weight"
    name = by_content if by_content in trace else f"{memory}.reader.weight"
    weight = trace[name].at(layer=layer, batch=row)
    return (weight.mean("head") if "head" in weight.axes else weight).values


def write_strength(trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0) -> np.ndarray:
    """How strongly each token wrote each slot, including input gate and weight of the bank: [n s]."""
    weight = trace[f"{memory}.writer.weight"].at(layer=layer, batch=row)
    if "token" in weight.axes:
        opened = rearrange(per_token(trace, f"{memory}.writer.input", row, layer), "n -> n 1")
        share = by_slot(trace, f"{memory}.writer.bank", weight.sizes["slot"], row, layer)
        return weight.values * opened * share
    opened = trace[f"{memory}.writer.input"].at(layer=layer, batch=row).mean("feature").values
    slots = weight.sizes["slot"]  # the first sources are the slots themselves; skip them
    among_tokens = weight.mean("head").values[:, :, slots:]
    return rearrange(among_tokens * rearrange(opened, "t s -> t s 1"), "t s m -> (t m) s")


def by_slot(trace: Trace, name: str, slots: int, row: int = 0, layer: int = 0) -> np.ndarray:
    """Each token's value for each bank, repeated for the bank's slots: [n s]; ones without banks."""
    if name not in trace:
        return np.ones((1, 1), np.float32)
    values = trace[name].at(layer=layer, batch=row).values
    return repeat(values, "n i -> n (i s)", s=slots // values.shape[1])


def provenance(trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0) -> np.ndarray:
    """The share of each earlier token's writes in each token's read: [n u], reader by writer.

    Later erasures shrink what token u wrote to slot s; token n then reads a part of the rest:
        own_su = g_u a_us prod_{v>u} (1 - a_vs g_v (1 - f_v)),     P_nu = sum_s r_ns own_su
    for u in earlier segments, with input gate g, forget gate f, write address a and read weight r. Banks
    decay and do not erase, so there every later token shrinks all slots. Raises TraceError for a memory that
    does not write token by token.
    """
    if "token" not in trace[f"{memory}.writer.weight"].axes:
        raise TraceError(f"{memory}: not written token by token, so a slot's content has no single writer")
    read = read_weight(trace, memory, row, layer)
    strength = write_strength(trace, memory, row, layer)
    if f"{memory}.writer.decay" in trace:
        remain = by_slot(trace, f"{memory}.writer.decay", read.shape[1], row, layer)
    else:
        kept = per_token(trace, f"{memory}.writer.forget", row, layer)
        remain = 1 - strength * rearrange(1 - kept, "n -> n 1")
    writes = trace[f"{memory}.after"].sizes["step"]
    length = len(strength) // writes
    own, share = np.zeros((read.shape[1], len(read))), np.zeros((len(read), len(read)))
    for segment in range(0, len(read), length):
        part = slice(segment, segment + length)
        share[part] = einsum(read[part], own, "n s, s u -> n u")
        for u in range(segment, min(segment + length, len(strength))):
            own *= rearrange(remain[u], "s -> s 1")
            own[:, u] += strength[u]
    return share


def retrieved(trace: Trace, memory: str = "external", row: int = 0, layer: int = 0) -> np.ndarray:
    """The weight of each earlier token in what each token retrieves: [n u], mean over heads.

        P_nu = mean_h sum_j w_hnj [source_hnj = u]

    A token without hits has a row of zeros.
    """
    weight = trace[f"{memory}.weight"].at(layer=layer, batch=row).values
    source = trace[f"{memory}.source"].at(layer=layer, batch=row).values.astype(int)
    heads, n, hits = source.shape
    share = np.zeros((n, n))
    token = np.broadcast_to(rearrange(np.arange(n), "n -> 1 n 1"), source.shape)
    found = source >= 0
    np.add.at(share, (token[found], source[found]), weight[found] / heads)
    return share


def best_hits(trace: Trace, memory: str = "external", row: int = 0, most: int = 8) -> dict[str, np.ndarray]:
    """The hits with most weight for each token, by layer and head: source, score, weight, [l h n j] each.

    source: the retrieved past token, -1 for no hit (score and weight are then 0). Raises TraceError if a hit
    is not in the recorded past: the recording then began in the middle of a stream.
    """
    source = trace[f"{memory}.source"].at(batch=row).values.astype(np.int32)
    score, weight = (trace[f"{memory}.{name}"].at(batch=row).values for name in ("score", "weight"))
    if (source >= np.arange(source.shape[2]).reshape(-1, 1)).any():
        raise TraceError(f"{memory}: hits include tokens from before the recording; record from the start")
    best = np.argsort(-weight, axis=-1, kind="stable")[..., :most]
    source, score, weight = (np.take_along_axis(part, best, -1) for part in (source, score, weight))
    return {
        "source": source,
        "score": np.where(source < 0, 0, score).astype(np.float32),
        "weight": weight.astype(np.float32),
    }


def slot_life(trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0) -> dict[str, np.ndarray]:
    """Measures of each slot in each segment, by name, each [t s].

    written, read: total weight of the segment's tokens; norm: of the slot after the write; change: norm of
    the difference that the write made; age: segments since the last write with weight above 0.1.
    """
    before = trace[f"{memory}.before"].at(layer=layer, batch=row)
    after = trace[f"{memory}.after"].at(layer=layer, batch=row)
    if "slot" not in after.axes:
        raise TraceError(f"{memory}: its state has no slots; it has {', '.join(after.axes)}")
    steps = after.sizes["step"]
    life = {}
    written, read = write_strength(trace, memory, row, layer), read_weight(trace, memory, row, layer)
    for name, weight in (("written", written), ("read", read[: len(written)])):
        life[name] = reduce(weight, "(t m) s -> t s", "sum", t=steps)
    life["change"] = np.linalg.norm(after.values - before.values, axis=-1)
    life["norm"] = np.linalg.norm(after.values, axis=-1)
    age = np.zeros_like(life["written"])
    for t in range(steps):
        age[t] = np.where(life["written"][t] > 0.1, 0, (age[t - 1] if t else 0) + 1)
    return life | {"age": age}


def chapter_loads(trace: Trace, memory: str = "chapters", layer: int = 0) -> np.ndarray:
    """The share of each chapter in the router's total weight: [c], sums to 1."""
    weight = trace[f"{memory}.weight"].at(layer=layer).values
    loads = reduce(weight, "b n c -> c", "sum")
    return loads / loads.sum()
