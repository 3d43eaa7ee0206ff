"""Views: one frame, three faces."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from memlib import load_config, override, record
from memlib.lab.widgets import (
    Form,
    View,
    drive,
    fusion_over_time,
    gates_over_time,
    page,
    reading,
    save_page,
    slots_over_time,
    strips,
)
from memlib.lab.widgets.frame import pack
from memlib.lab.widgets.host import FRONT, front_end
from memlib.lab.widgets.page import LIMIT, figure
from memlib.lab.widgets.slots import slot_view
from memlib.lab.widgets.view import FACES
from memlib.models import MemoryTransformer


def unpack(packed: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """The front end's `decode`, written again."""
    (length,) = struct.unpack_from("<I", packed)
    header = json.loads(packed[4 : 4 + length])
    arrays = {}
    for entry in header["arrays"]:
        dtype = {"f4": "<f4", "i4": "<i4", "u2": "<u2", "u1": "u1"}[entry["dtype"]]
        count = int(np.prod(entry["shape"]))
        values = np.frombuffer(packed, dtype, count, entry["offset"]).reshape(entry["shape"])
        if "step" in entry:
            values = entry["low"] + entry["step"] * values
        arrays[entry["name"]] = values
    return header, arrays


def random_slots(steps=5, slots=32, seed=0):
    rng = np.random.default_rng(seed)
    return slot_view({"norm": rng.random((steps, slots), dtype=np.float32)}, banks=2)


@pytest.fixture(scope="module")
def trace():
    model = MemoryTransformer(override(load_config("recall_internal"), {"memory.internal.num_slots": 16}))
    with record(model) as trace, torch.no_grad():
        model(torch.randint(0, 64, (2, 48)))
    return trace


def test_packing_keeps_every_bit():
    view = random_slots()
    header, arrays = unpack(pack(view))
    assert np.array_equal(arrays["norm"], view.arrays["norm"])
    assert header["times"] == 5 and header["items"] == 32 and header["words"]["banks"] == 2
    assert all(entry["offset"] % 4 == 0 for entry in header["arrays"])


@pytest.mark.parametrize("precision,steps", [("u2", 65535), ("u1", 255)])
def test_rounding_is_within_half_a_step(precision, steps):
    view = random_slots()
    _, arrays = unpack(pack(view, precision))
    span = np.ptp(view.arrays["norm"])
    error = np.abs(arrays["norm"] - view.arrays["norm"]).max()
    assert 0 < error <= 0.5 * span / steps + 1e-6


def test_rounding_a_constant():
    flat = slot_view({"norm": np.full((2, 4), 3.0, np.float32)})
    _, arrays = unpack(pack(flat, "u1"))
    assert (arrays["norm"] == 3).all()


def test_integers_are_never_rounded():
    words = ["a", "b", "c"]
    origin = np.array([[0, 0, 0], [1, 0, 0], [0.5, 0.25, 0]])
    _, arrays = unpack(pack(reading(words, np.array([0, 1, 0.5]), origin, hits=2), "u1"))
    assert arrays["source"].tolist() == [[-1, -1], [0, -1], [0, 1]]


def test_8192_slots_over_64_steps_fit_a_megabyte():
    big = random_slots(64, 8192)
    text = figure(big)
    assert len(text) <= LIMIT
    header, arrays = unpack(zlib.decompress(base64.b64decode(text)))
    assert header["arrays"][0]["dtype"] == "u1"  # random numbers do not compress; real ones stay finer
    assert arrays["norm"].shape == (64, 8192)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"bytes in a page, more than 1,000,000; show fewer"):
        figure(random_slots(200, 8192))


def test_page_is_one_file_without_requests(tmp_path, trace):
    save_page(tmp_path / "x.html", gates_over_time(trace), slots_over_time(trace), title="A <b> title")
    text = (tmp_path / "x.html").read_text()
    assert "A &lt;b&gt; title" in text and text.count("data-memlib>") == 2
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(|\bimport\b.*from|fetch\(""", text)


def test_page_needs_a_view():
    with pytest.raises(ValueError, match="at least one view"):
        page()


def test_front_end_imports_nothing():
    for path in FRONT.glob("*.js"):
        text = path.read_text()
        assert not re.search(r"^\s*import\b|\bimport\(|https?://", text, re.M), path.name
    assert front_end("jupyter").count("export default") == 1


def test_live_face_keeps_a_picture_for_those_without_a_kernel(trace, monkeypatch):
    monkeypatch.delenv(FACES, raising=False)
    data, _ = gates_over_time(trace)._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}


def test_static_face_is_a_picture_with_its_text(trace, monkeypatch):
    monkeypatch.setenv(FACES, "static")
    view = gates_over_time(trace, word=lambda token: '"<x>')
    data, _ = view._repr_mimebundle_()
    assert set(data) == {"text/html", "image/png", "text/plain"}
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == view.summary
    assert f'alt="{view.summary}"' in data["text/html"] and 'src="data:image/png;base64,' in data["text/html"]


def test_summary_tells_the_picture(trace):
    gates = gates_over_time(trace, ["internal.writer.input"])
    values = gates.arrays["lines"][0]
    assert f"from {values.min():.2f} to {values.max():.2f}" in gates.summary
    slots = slots_over_time(trace)
    life = np.maximum(slots.arrays["written"], slots.arrays["read"]).max(0)
    assert f"{(life <= 0.05).sum()} slots were never written or read" in slots.summary


def test_views_of_one_stream_move_together(trace):
    first, second = gates_over_time(trace), slots_over_time(trace, segment_length=16)
    assert first.group == second.group != gates_over_time(trace, row=1).group
    assert (first.tokens_per_time, second.tokens_per_time) == (1, 16)


def test_a_static_view_opens_without_torch(tmp_path, trace):
    """A trace saved here becomes a page in a process where torch cannot be imported."""
    trace.save(tmp_path / "t.safetensors")
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from memlib.lab.trace import Trace\n"
        "from memlib.lab.widgets.gates import gates_over_time\n"
        "from memlib.lab.widgets.page import save_page\n"
        f"trace = Trace.load({str(tmp_path / 't.safetensors')!r})\n"
        f"save_page({str(tmp_path / 'x.html')!r}, gates_over_time(trace))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.html").stat().st_size > 10_000


def test_strips_show_zero_to_one_only():
    with pytest.raises(ValueError, match="values from 0 to 3; strips show 0 to 1"):
        strips({"a": np.array([0, 3.0])}, ["x", "y"], "T")
    with pytest.raises(ValueError, match="lines of 2 values and 1 words"):
        strips({"a": np.array([0, 1.0])}, ["x"], "T")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"arrays": {"norm": np.zeros((1, 1))}}, "is float64; use float32 or int32"),
        ({"arrays": {"norm": np.full((1, 1), np.nan, np.float32)}}, "not finite"),
        ({"times": 0}, "0 times and 1 items"),
    ],
)
def test_bad_views_are_refused(changes, message):
    plain = {"kind": "slots", "title": "x", "summary": "", "arrays": {}, "draw": print, "times": 1}
    with pytest.raises(ValueError, match=message):
        View(**(plain | changes))


def test_cursor_from_the_browser_reaches_python():
    stage, heard = random_slots().live(), []
    stage.on_move(lambda stage: heard.append((stage.time, stage.item, stage.choice["order"])))
    stage.hear({"type": "cursor", "time": 3, "item": 7, "choice": {"order": "most first"}})
    assert heard == [(3, 7, "most first")]
    with pytest.raises(IndexError, match="it has segments 0 to 4 and items 0 to 31"):
        stage.hear({"type": "cursor", "time": 5, "item": 0})
    with pytest.raises(ValueError, match="no choice order = 'loudest'"):
        stage.go(choice={"order": "loudest"})
    with pytest.raises(ValueError, match="no action 'pause'; available: none"):
        stage.hear({"type": "action", "name": "pause"})
    assert (stage.time, stage.item) == (3, 7)


def test_drive_moves_everything_and_hears_what_breaks(trace):
    assert drive(gates_over_time(trace)) == 3 * 2
    stage = slots_over_time(trace).live()

    def broken(stage):
        if stage.item > 10:
            raise RuntimeError("only the far end is broken")

    stage.on_move(broken)
    with pytest.raises(RuntimeError, match="far end"):
        drive(stage)


def form(build=None):
    def plain(slots, steps, how):
        assert how in ("even", "odd")
        return random_slots(steps, slots)

    return Form(build or plain, {"steps": 4}, slots=(2, 8), steps=(2, 6), how=["even", "odd"])


def test_form_builds_the_view_anew():
    made = form()
    assert made.stage.view.times == 4 and made.stage.view.items == 2
    made.controls["slots"].value = 6
    assert made.stage.view.items == 6
    header, _ = unpack(made.stage.frame)
    assert header["items"] == 6


def test_drive_finds_a_form_broken_at_one_end_only():
    assert drive(form()) >= 3 + 3 + 2

    def breaks(slots, steps, how):
        if steps == 6:
            raise ZeroDivisionError("six")
        return random_slots(steps, slots)

    with pytest.raises(ZeroDivisionError, match="six"):
        drive(form(breaks))


def test_form_refuses_what_is_no_control():
    with pytest.raises(TypeError, match="depth = 'deep': a control is"):
        Form(lambda depth: random_slots(), depth="deep")


def test_fusion_shows_the_weights_and_who_was_searched_for():
    torch.manual_seed(0)
    model = MemoryTransformer(load_config("mixed_hybrid")).eval()
    model.block(0).memories["external"].retrieval.query.weight.data.normal_()
    model.block(0).fusion.gate.weight.data.normal_()
    with record(model) as trace:
        model(torch.randint(80, (2, 64), generator=torch.Generator().manual_seed(0)))
    view = fusion_over_time(trace, ("attention", "internal", "external"), row=1, segment_length=32)
    rows = dict(zip(view.words["rows"], view.arrays["lines"], strict=True))
    assert list(rows) == ["attention", "internal", "external", "retrieval gate", "search"]
    weight = trace["fusion.weight"].at(layer=0, batch=1).values
    for i, name in enumerate(("attention", "internal", "external")):
        assert np.array_equal(rows[name], weight[:, i])
    assert np.array_equal(rows["search"] == 1, rows["retrieval gate"] > 0.5)
    with pytest.raises(ValueError, match="sources attention, internal: the fusion has 3 sources"):
        fusion_over_time(trace, ("attention", "internal"))
