"""Recordings: labelled, complete, free of side effects, and readable without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from memlib import MemoryTransformer, override, record
from memlib.config import Config
from memlib.lab.trace import LabelledArray, Trace, TraceError
from memlib.nn.hook_point import HookPoint

SIZES = {
    "model.hidden_dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 3,
    "model.intermediate_dim": 16,
    "model.vocab_size": 20,
    "model.segment_length": 5,
    "memory.kinds": ["internal"],
    "memory.internal.num_slots": 8,
    "memory.memory_layer_placement": "last_k",
    "memory.memory_layer_k": 2,
}


def small_model(**changes) -> MemoryTransformer:
    torch.manual_seed(0)
    return MemoryTransformer(override(Config(), SIZES | changes))


def record_stream(model, pieces=(12,)):
    ids = torch.randint(0, 20, (2, sum(pieces)), generator=torch.Generator().manual_seed(1))
    state, logits = None, []
    with record(model) as trace:
        for piece in ids.split(list(pieces), 1):
            outputs = model(piece, memory_state=state)
            state = outputs.memory_state
            logits.append(outputs.logits)
    return trace, ids, torch.cat(logits, 1)


def test_axes_and_sizes():
    trace, ids, _ = record_stream(small_model())
    assert np.array_equal(trace["tokens"].values, ids.numpy())
    assert trace["internal.writer.input"].sizes == {"layer": 2, "batch": 2, "token": 10}
    assert trace["internal.reader.weight"].sizes == {"layer": 2, "batch": 2, "token": 12, "slot": 8}
    assert trace["internal.after"].sizes == {"layer": 2, "step": 2, "batch": 2, "slot": 8, "feature": 16}
    assert trace["fusion.weight"].sizes == {"layer": 2, "batch": 2, "token": 12, "source": 2}
    assert trace.layers["fusion.weight"] == [1, 2]


@pytest.mark.parametrize("write", ["addressed", "attention"])
def test_every_probe_is_recorded_under_its_own_axes(write):
    model = small_model(**{"memory.internal.write": write})
    trace, _, _ = record_stream(model)
    probes = [m for m in model.modules() if isinstance(m, HookPoint)]
    assert len(trace.points) - 1 == len(probes) / 2
    for array in trace.points.values():
        assert array.values.ndim == len(array.axes)


def test_gates_are_what_the_model_used():
    model = small_model()
    trace, _, _ = record_stream(model)
    assert np.allclose(trace["fusion.weight"].values.sum(-1), 1, atol=1e-6)
    first, after = trace["internal.before"].at(step=1), trace["internal.after"].at(step=0)
    assert np.array_equal(first.values, after.values)


def test_the_same_however_the_stream_is_fed():
    whole, _, _ = record_stream(small_model())
    pieces, _, _ = record_stream(small_model(), (1, 3, 7, 1))
    for name in whole:
        assert np.allclose(whole[name].values, pieces[name].values, atol=1e-5), name


def test_recording_changes_nothing_and_leaves_nothing():
    model = small_model()
    _, ids, logits = record_stream(model)
    assert torch.equal(model(ids).logits, logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_the_block_fails():
    model = small_model()
    with pytest.raises(ValueError, match="ids are 0"), record(model):
        model(torch.full((1, 4), 99))
    assert not any(m._forward_hooks for m in model.modules())


def test_saves_and_opens_without_torch(tmp_path):
    trace, _, _ = record_stream(small_model())
    trace.save(tmp_path / "trace.safetensors")
    again = Trace.load(tmp_path / "trace.safetensors")
    assert list(again) == list(trace) and again.layers == trace.layers
    for name in trace:
        assert again[name].axes == trace[name].axes
        assert np.array_equal(again[name].values, trace[name].values)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from memlib.lab.trace import Trace\n"
        "print(Trace.load(sys.argv[1])['internal.after'])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "trace.safetensors")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("LabelledArray(layer=2, step=2")


def test_what_is_not_a_trace_is_refused(tmp_path):
    trace, _, _ = record_stream(small_model())
    path = tmp_path / "trace.safetensors"
    trace.save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TraceError, match="damaged"):
        Trace.load(path)
    with pytest.raises(TraceError, match="no such file"):
        Trace.load(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"no point 'gates'; recorded: tokens, internal\.reader"):
        trace["gates"]


def test_labelled_array():
    array = LabelledArray(np.arange(6).reshape(2, 3), ("layer", "token"))
    assert array.at(layer=1).values.tolist() == [3, 4, 5]
    assert array.mean("token").values.tolist() == [1.0, 4.0]
    assert repr(array) == "LabelledArray(layer=2, token=3)"
    with pytest.raises(TraceError, match="no axis 'slot'"):
        array.at(slot=0)


def test_states_are_recorded_under_the_axes_they_declare():
    model = small_model()
    ids = torch.randint(0, 20, (2, 15), generator=torch.Generator().manual_seed(1))
    with record(model, states=True) as trace:
        state = model(ids[:, :10]).memory_state
        last = model(ids[:, 10:], memory_state=state).memory_state
    slots = trace["internal.state.slots"]
    assert slots.sizes == {"layer": 2, "step": 2, "batch": 2, "slot": 8, "feature": 16}
    for step, seen in enumerate((state, last)):
        for layer in range(2):
            want = seen.memories[layer].slots.detach().numpy()
            assert np.array_equal(slots.at(layer=layer, step=step).values, want)
    with record(model) as quiet:
        model(ids)
    assert "internal.state.slots" not in quiet
