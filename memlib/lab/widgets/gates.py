"""Gate values and fusion weights over the tokens of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memlib.lab.measures import per_token
from memlib.lab.trace import Trace
from memlib.lab.widgets.strips import token_strips
from memlib.lab.widgets.view import View


def fusion_over_time(
    trace: Trace,
    sources: Sequence[str],
    word: Callable[[int], str] = str,
    row: int = 0,
    layer: int = 0,
    segment_length: int = 0,
) -> View:
    """Fusion weights of each token: one strip per source of the softmax fusion, summing to 1.

    sources: "attention" and the memories' kinds, in the configuration's order. With a retrieval gate there
    are two more strips: sigma(g), and whether the token triggered a search. Raises ValueError if the number
    of sources differs from the fusion's.
    """
    weight = trace["fusion.weight"].at(layer=layer, batch=row)
    if len(sources) != weight.sizes["source"]:
        raise ValueError(f"sources {', '.join(sources)}: the fusion has {weight.sizes['source']} sources")
    lines = {name: weight.at(source=i).values for i, name in enumerate(sources)}
    for label, name in (("retrieval gate", "external.retrieval"), ("search", "external.search")):
        if name in trace:
            lines[label] = per_token(trace, name, row, layer)
    return token_strips(trace, lines, "Fusion weights over time", word, row, segment_length, gates=True)


def gates_over_time(
    trace: Trace,
    names: Sequence[str] = ("internal.writer.input", "internal.writer.forget"),
    word: Callable[[int], str] = str,
    row: int = 0,
    segment_length: int = 0,
) -> View:
    """One strip per gate and layer, over the tokens of one stream.

    names: recorded points with values in 0 … 1; word: the name of a token id (a task's `name_of`).
    """
    lines = {}
    for name in names:
        label, layers = name.rsplit(".", 1)[-1], trace.layers.get(name, [0])
        for i, layer in enumerate(layers):
            lines[f"{label}, layer {layer}" if len(layers) > 1 else label] = per_token(trace, name, row, i)
    return token_strips(trace, lines, "Gates over time", word, row, segment_length, gates=True)
