"""What recordings say about a memory, as plain arrays: who wrote which slot, who read it, whose words.

Axes: n tokens of the stream, s slots, t segments (a write each). `layer` counts the layers that a point
was recorded in; `row` is a stream of the batch.
"""

from __future__ import annotations

import numpy as np
from einops import einsum, rearrange, reduce

from memlib.lab.trace import Trace, TraceError


def per_token(trace: Trace, name: str, row: int = 0, layer: int = 0) -> np.ndarray:
    """A point as one number per token [n]; other axes are averaged, and one per write counts for all
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
    """How much of each token's reading came from each slot: [n s], each row summing to 1."""
    weight = trace[f"{memory}.reader.weight"].at(layer=layer, batch=row)
    return (weight.mean("head") if "head" in weight.axes else weight).values


def write_strength(trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0) -> np.ndarray:
    """How strongly each token wrote each slot, input gate included: [n s]."""
    weight = trace[f"{memory}.writer.weight"].at(layer=layer, batch=row)
    if "token" in weight.axes:
        return weight.values * rearrange(per_token(trace, f"{memory}.writer.input", row, layer), "n -> n 1")
    opened = trace[f"{memory}.writer.input"].at(layer=layer, batch=row).mean("feature").values
    slots = weight.sizes["slot"]  # which are sources too, and no words
    among_tokens = weight.mean("head").values[:, :, slots:]
    return rearrange(among_tokens * rearrange(opened, "t s -> t s 1"), "t s m -> (t m) s")


def provenance(trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0) -> np.ndarray:
    """How much of what each token read was written by each earlier token: [n n], reader by writer.

    What token u put into slot s is thinned by every later erasure; a token t then reads a share of it:
        own_su = i_u a_us prod_{v>u} (1 - a_vs i_v (1 - f_v)),     P_tu = sum_s r_ts own_su
    over the u of earlier segments. Raises TraceError for a memory whose tokens do not write one by one.
    """
    if "token" not in trace[f"{memory}.writer.weight"].axes:
        raise TraceError(f"{memory}: not written token by token, so no token owns what a slot holds")
    read = read_weight(trace, memory, row, layer)
    strength = write_strength(trace, memory, row, layer)
    kept = per_token(trace, f"{memory}.writer.forget", row, layer)
    remain = 1 - strength * rearrange(1 - kept, "n -> n 1")
    writes = trace[f"{memory}.after"].sizes["step"]
    length = len(read) // writes
    own, said = np.zeros((read.shape[1], len(read))), np.zeros((len(read), len(read)))
    for segment in range(0, len(read), length):
        part = slice(segment, segment + length)
        said[part] = einsum(read[part], own, "n s, s u -> n u")
        for u in range(segment, min(segment + length, len(read))):
            own *= rearrange(remain[u], "s -> s 1")
            own[:, u] += strength[u]
    return said


def retrieved(trace: Trace, memory: str = "external", row: int = 0, layer: int = 0) -> np.ndarray:
    """How much of what each token was given back came from each earlier token: [n n], mean over heads.

        P_tu = mean_h sum_j w_htj [source_htj = u]

    A token for which nothing came back has a row of zeros.
    """
    weight = trace[f"{memory}.weight"].at(layer=layer, batch=row).values
    source = trace[f"{memory}.source"].at(layer=layer, batch=row).values.astype(int)
    heads, n, hits = source.shape
    said = np.zeros((n, n))
    token = np.broadcast_to(rearrange(np.arange(n), "n -> 1 n 1"), source.shape)
    found = source >= 0
    np.add.at(said, (token[found], source[found]), weight[found] / heads)
    return said


def slot_life(trace: Trace, memory: str = "internal", row: int = 0, layer: int = 0) -> dict[str, np.ndarray]:
    """What happened to each slot in each segment, by name, each [t s].

    written, read: the segment's total weight on the slot; norm: of its content after the write; change:
    how far the write moved it; age: segments since it was last written (weight above 0.1).
    """
    before = trace[f"{memory}.before"].at(layer=layer, batch=row)
    after = trace[f"{memory}.after"].at(layer=layer, batch=row)
    if "slot" not in after.axes:
        raise TraceError(f"{memory}: its state has no slots; it has {', '.join(after.axes)}")
    steps = after.sizes["step"]
    life = {}
    for name, measure in (("written", write_strength), ("read", read_weight)):
        weight = measure(trace, memory, row, layer)
        whole = weight[: len(weight) // steps * steps]
        life[name] = rearrange(whole, "(t n) s -> t n s", t=steps).sum(1)
    life["change"] = np.linalg.norm(after.values - before.values, axis=-1)
    life["norm"] = np.linalg.norm(after.values, axis=-1)
    age = np.zeros_like(life["written"])
    for t in range(steps):
        age[t] = np.where(life["written"][t] > 0.1, 0, (age[t - 1] if t else 0) + 1)
    return life | {"age": age}


def chapter_loads(trace: Trace, memory: str = "chapters", layer: int = 0) -> np.ndarray:
    """How much of all reading went to each chapter, by the router's weights: [c], summing to 1."""
    weight = trace[f"{memory}.weight"].at(layer=layer).values
    loads = reduce(weight, "b n c -> c", "sum")
    return loads / loads.sum()
