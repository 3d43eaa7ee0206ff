"""Recordings of a model's hook points, as labelled arrays.

    with record(model) as trace:
        model(input_ids)
    trace["internal.writer.input"]          # axes: layer batch token

A recording listens to the model's `HookPoint`s; the model needs no code for it. Points with a token axis are
concatenated over calls and segments, so `token` counts the stream's tokens. The others get a `step` axis, one
entry per write. The same point of several layers gets a `layer` axis. A trace contains numpy arrays only: it
is saved to one safetensors file and can be opened without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from torch import Tensor

    from memlib.models.protocol import RecurrentModel
    from memlib.nn.hook_point import Listener

FORMAT = "memlib-trace-1"


class TraceError(RuntimeError):
    """A trace lacks a point or axis, or cannot be read; the message lists what is available."""


@dataclass(frozen=True)
class LabelledArray:
    """An array whose axes have names.

    >>> gate.axes
    ('layer', 'batch', 'token')
    >>> gate.at(layer=0, batch=2).values.shape
    """

    values: np.ndarray
    axes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.values.shape, strict=True))

    def at(self, **index: int) -> LabelledArray:
        """Index named axes; the indexed axes are removed."""
        if unknown := set(index) - set(self.axes):
            raise TraceError(f"no axis {sorted(unknown)[0]!r}: this array has {', '.join(self.axes)}")
        picks = tuple(index.get(axis, slice(None)) for axis in self.axes)
        return LabelledArray(self.values[picks], tuple(a for a in self.axes if a not in index))

    def mean(self, axis: str) -> LabelledArray:
        """The mean over a named axis."""
        if axis not in self.axes:
            raise TraceError(f"no axis {axis!r}: this array has {', '.join(self.axes)}")
        rest = tuple(a for a in self.axes if a != axis)
        return LabelledArray(self.values.mean(self.axes.index(axis)), rest)

    def __repr__(self) -> str:
        return f"LabelledArray({', '.join(f'{a}={n}' for a, n in self.sizes.items())})"


@dataclass
class Trace:
    """Recorded points by name, with `tokens` [batch token]; layers: the layers in which each was recorded."""

    points: dict[str, LabelledArray] = field(default_factory=dict)
    layers: dict[str, list[int]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LabelledArray:
        if name not in self.points:
            raise TraceError(f"no point {name!r}; recorded: {', '.join(self.points) or 'nothing'}")
        return self.points[name]

    def __contains__(self, name: str) -> bool:
        return name in self.points

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __repr__(self) -> str:
        lines = [f"  {name}: {array}" for name, array in self.points.items()]
        return "\n".join(["Trace", *lines])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        target = Path(path)
        scratch = target.with_name(target.name + ".part")
        labels = {name: list(array.axes) for name, array in self.points.items()}
        save_file(
            {name: np.ascontiguousarray(array.values) for name, array in self.points.items()},
            scratch,
            {"format": FORMAT, "axes": json.dumps(labels), "layers": json.dumps(self.layers)},
        )
        os.replace(scratch, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Open a saved trace; raises TraceError for any other file."""
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TraceError(f"{path}: not a trace ({FORMAT}); write one with trace.save(path)")
                axes, layers = json.loads(metadata["axes"]), json.loads(metadata["layers"])
                points = {name: LabelledArray(file.get_tensor(name), tuple(axes[name])) for name in axes}
        except FileNotFoundError:
            raise TraceError(f"{path}: no such file") from None
        except (OSError, ValueError, KeyError) as error:
            raise TraceError(f"{path}: cannot be read as a trace: {error}") from None
        except Exception as error:  # safetensors raises its own type, known only to its extension
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{path}: damaged or not a trace: {error}") from None
        return cls(points, layers)


@contextmanager
def record(model: RecurrentModel, states: bool = False) -> Iterator[Trace]:
    """Record every hook point of a model inside a `with` block; the trace is complete after the block.

    states: also record each memory's state after each call, under the axes that it declares:
    `internal.state.slots` has layer, step, batch, slot and feature.
    """
    from memlib.nn.hook_point import HookPoint

    recorded: dict[str, dict[int, list[np.ndarray]]] = {}
    axes: dict[str, tuple[str, ...]] = {"tokens": ("batch", "token")}
    tokens: list[np.ndarray] = []
    listening: list[tuple[HookPoint, Listener]] = []

    def listen(layer: int, point: HookPoint) -> None:
        axes[point.name] = point.axes

        def hear(value: Tensor) -> None:
            array = value.detach().float().cpu().numpy()
            recorded.setdefault(point.name, {}).setdefault(layer, []).append(array)

        point.listeners.append(hear)
        listening.append((point, hear))

    def hear_states(_module: Any, _inputs: Any, output: Any) -> None:
        for layer, slots in model.stack.slots.items():
            for slot, kind in zip(slots, model.stack.layers[layer], strict=True):
                state = output.memory_state.memories[slot]
                for name, value, labels in state.labelled_tensors(f"{kind}.state."):
                    # Tokens that a state keeps are its slots; `token` counts those of the stream.
                    axes[name] = tuple("slot" if axis == "token" else axis for axis in labels)
                    array = value.detach().cpu().numpy()
                    recorded.setdefault(name, {}).setdefault(layer, []).append(array)

    def hear_tokens(_module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = inputs[0] if inputs else keywords["input_ids"]
        tokens.append(ids.detach().cpu().numpy())

    for layer, block in enumerate(model.blocks):
        for module in block.modules():
            if isinstance(module, HookPoint):
                listen(layer, module)
    hooks = [model.register_forward_pre_hook(hear_tokens, with_kwargs=True)]
    if states:
        hooks.append(model.register_forward_hook(hear_states))
    trace = Trace()
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()
        for point, hear in listening:
            point.listeners.remove(hear)
    if tokens:
        trace.points["tokens"] = LabelledArray(np.concatenate(tokens, 1), axes["tokens"])
    for name, by_layer in recorded.items():
        trace.layers[name] = sorted(by_layer)
        trace.points[name] = join([by_layer[layer] for layer in sorted(by_layer)], axes[name])


def join(layers: list[list[np.ndarray]], axes: tuple[str, ...]) -> LabelledArray:
    """Join the values of a point by layer: tokens are concatenated, other values stacked as steps."""
    if "token" in axes:
        axis = axes.index("token")
        return LabelledArray(np.stack([np.concatenate(values, axis) for values in layers]), ("layer", *axes))
    return LabelledArray(np.stack([np.stack(values) for values in layers]), ("layer", "step", *axes))
