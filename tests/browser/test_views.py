"""The front-end core alone, in a page from disk: no kernel, no server."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from memlib import load_config, override, record
from memlib.lab.ablation import Question, ablate
from memlib.lab.levels import levels_of
from memlib.lab.widgets import (
    chapters_over_time,
    gates_over_time,
    hits_view,
    inspect_slots,
    launch_view,
    levels_over_time,
    reading_over_text,
    save_page,
    slots_over_time,
    strips,
)
from memlib.lab.widgets.inspector import busiest_slots, main_writer
from memlib.lab.widgets.slots import slot_view
from memlib.lab.widgets.training import training_view
from memlib.models import MemoryTransformer
from memlib_kernels.attention import flash_attention

KINDS = ["strips", "slots", "inspector", "reading", "training", "levels", "hits", "launch"]
STEPS, SLOTS = 64, 8 * 1024


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 64, (1, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hits():
    """A hybrid's memory in two layers, its retrieval gate shut for some tokens."""
    torch.manual_seed(0)
    gated = {"memory.external.retrieval_gate": "query", "memory.memory_layer_k": 2}
    model = MemoryTransformer(override(load_config("recall_external"), gated)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with record(model) as trace, torch.no_grad():
        model(torch.randint(0, 64, (1, 64)))
    return hits_view(trace, lambda t: f"w{t}", segment_length=16, marked=[50, 60])


@pytest.fixture(scope="module")
def launch():
    """A recorded launch: causal attention of 40 tokens in tiles of 16."""
    interpreter = pytest.importorskip("memlib_kernels.interpreter", reason="Triton exists for Linux only")
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    with interpreter.interpreted(block=16, record=True) as record:
        flash_attention(q, k, v, causal=True)
    return launch_view(record, {"Q": 16, "K": 16, "Out": 16, "Lse": 1}, pairs=("Q", "K"))


def stirred(preset, changes, ids):
    """A model with no value at its neutral start, and its trace of a stream."""
    torch.manual_seed(0)
    model = MemoryTransformer(override(load_config(preset), changes))
    with torch.no_grad():
        for p in model.eval().parameters():
            p.add_(0.3 * torch.randn_like(p))
    with record(model) as trace, torch.no_grad():
        model(ids)
    return model, trace


@pytest.fixture(scope="module")
def hierarchy(ids):
    """Three banks, blocks of six tokens: the trace of a hierarchy of states."""
    shape = {"memory.hds.num_memories": 3, "memory.hds.num_slots": 8, "memory.hds.chunk_size": 6}
    return stirred("recall_hds", shape, ids)[1]


@pytest.fixture(scope="module")
def views(ids, hierarchy, hits, launch):
    model, trace = stirred("recall_internal", {"memory.internal.num_slots": 32}, ids)
    questions = [Question(50, 3), Question(60, 5)]
    slots = busiest_slots(trace, most=12)
    ablation = ablate(model, ids[0], questions, main_writer(trace), slots)
    records = [(s, {"loss": 3 / s, "accuracy": s / 50, "gate": 0.5}) for s in range(1, 41)]
    return {
        "strips": gates_over_time(trace, word=lambda t: f"w{t}", segment_length=16),
        "slots": slots_over_time(trace, segment_length=16),
        # Fewer words than the model has room for, as every task has.
        "inspector": inspect_slots(trace, ablation, 50, lambda t: f"w{t}", segment_length=16),
        "reading": reading_over_text(trace, lambda t: f"w{t}", segment_length=16, marked=[50, 60]),
        "training": training_view(records, "finished", 0.06, True),
        "levels": levels_over_time(hierarchy, lambda t: f"w{t}"),
        "hits": hits,
        "launch": launch,
    }


@pytest.fixture(scope="module")
def address(views, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "views.html"
    save_page(path, *views.values(), title="Every view")
    return path.as_uri()


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """8 banks of 1024 slots over 64 steps, and the page that shows them."""
    values = np.random.default_rng(0).random((STEPS, SLOTS), dtype=np.float32)
    path = tmp_path_factory.mktemp("big") / "big.html"
    save_page(path, slot_view({"norm": values}, banks=8))
    return values, path.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_draws_and_passes_axe(open_sheet, address, screenshot, scheme):
    from axe_playwright_python.sync_playwright import Axe

    sheet = open_sheet(address, color_scheme=scheme)
    for kind in KINDS:
        figure = sheet.figure(kind)
        screenshot(figure.locator, f"{kind}_{scheme}")
        figure.locator.locator("summary").click()  # axe sees only what is open
    found = Axe().run(sheet.page).response["violations"]
    assert not found, [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found]
    sheet.assert_clean()


def test_themes_differ_where_they_should(open_sheet, address):
    """Ink on paper, both ways round: the first pixel of the axis' text is not the paper's colour."""
    seen = {}
    for scheme in ("light", "dark"):
        figure = open_sheet(address, color_scheme=scheme).figure("strips")
        style = "f => { const s = getComputedStyle(f); return [s.color, s.backgroundColor]; }"
        seen[scheme] = figure.locator.evaluate(style)
    brightness = {k: [sum(map(int, c[4:-1].split(","))) for c in v] for k, v in seen.items()}
    assert brightness["light"][0] < 150 and brightness["light"][1] > 700
    assert brightness["dark"][0] > 600 and brightness["dark"][1] < 150


@pytest.mark.parametrize("kind", KINDS)
def test_keys(open_sheet, address, views, kind):
    view, figure = views[kind], open_sheet(address).figure(kind)
    last = view.times - 1
    figure.press("Home")
    assert figure.time == 0
    figure.press("ArrowLeft")
    assert figure.time == 0, "the start is the start"
    first = figure.image()
    figure.press("ArrowRight", "ArrowRight")
    assert figure.time == 2
    assert figure.image() != first
    figure.press("PageDown")
    assert figure.time == min(last, 2 + view.page)
    figure.press("End", "ArrowRight")
    assert figure.time == last
    figure.press("ArrowLeft")
    assert figure.time == last - 1
    if view.items > 1:
        figure.press(*["ArrowUp"] * min(view.items, 100))
        begun = figure.item
        figure.press(".")
        assert figure.item == begun + 1
        figure.press(",")
        assert figure.item == begun


def test_readout_and_tooltip_say_the_exact_value(open_sheet, address, views):
    figure = open_sheet(address).figure("strips")
    gate = views["strips"].arrays["lines"]
    figure.press("Home", *["ArrowRight"] * 7)
    assert f"= {gate[0, 7]:.4f}" in figure.readout and "token 7" in figure.readout
    place = figure.place(20, 1)
    figure.canvas.hover(position={"x": place["x"] + place["width"] / 2, "y": place["y"] + 8})
    tip = figure.locator.locator(".memlib-tip")
    assert tip.is_visible() and "token 20" in tip.inner_text() and f"{gate[1, 20]:.4f}" in tip.inner_text()
    assert figure.time == 7, "hovering looks and does not move"


def test_inspector_says_what_the_ablation_found(open_sheet, address, views):
    figure = open_sheet(address).figure("inspector")
    arrays = views["inspector"].arrays
    figure.press(*["ArrowUp"] * 12, *["ArrowDown"] * 5)
    assert figure.item == 5
    for name, choice in (("together", "all slots of its writer"), ("alone", "this slot")):
        figure.locator.locator('select[data-choice="without"]').select_option(choice)
        for q, (token, answer) in enumerate(((50, 3), (60, 5))):
            figure.locator.locator('select[data-choice="question"]').select_option(index=q)
            goes = f"from {arrays['before'][q, answer]:.4f} to {arrays[name][5, q, answer]:.4f}"
            assert f"Without {choice}, w{answer} after token {token}" in figure.readout
            assert goes in figure.readout


def test_levels_say_what_a_token_sees(open_sheet, address, hierarchy):
    """Share of the reading, blocks, what is written and what is left, against numpy."""
    seen, figure = levels_of(hierarchy), open_sheet(address).figure("levels")
    figure.press("End", *["ArrowUp"] * 8)
    last, said = 63, []
    for row in range(4 + 3):
        assert figure.item == row
        said.append(figure.readout)
        figure.press("ArrowDown")
    for level in range(4):
        assert f"{seen.level[last, level]:.4f} of its read" in said[level]
    best = int(seen.block[last].argmax())
    first, end = seen.bounds[best]
    assert f"8 blocks are complete, most weight: tokens {first}–{end} {seen.block[last, best]:.4f}" in said[1]
    assert f"empty block {seen.nothing[last]:.4f}" in said[1] and "the mean of 48 tokens" in said[2]
    for bank in range(3):
        share = seen.level[last, 3] * seen.read[last, bank]
        left = seen.left[3, :, bank]
        assert f"½ in {seen.half_lives[bank]:.1f} segments: {share:.4f} of its read" in said[4 + bank]
        assert f"it writes {seen.written[last, bank]:.4f}" in said[4 + bank]
        assert f"most remains of token {left.argmax()} “" in said[4 + bank]
        assert said[4 + bank].endswith(f": {left.max():.4f}")


def test_levels_draw_what_is_left(open_sheet, address, hierarchy):
    """A cell of a bank has cividis' colour for what is left of that token; in another segment less is."""
    from matplotlib import colormaps

    seen, figure = levels_of(hierarchy), open_sheet(address).figure("levels")
    for segment in (2, 3):
        figure.press("Home", *["PageDown"] * segment)
        figure.settle()
        for bank, token in ((0, 3), (1, 17), (2, 30)):
            place = figure.place(token, 4 + bank)
            pixel = figure.pixel(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
            value = seen.left[segment, token, bank] / seen.left.max()
            expected = 255 * np.array(colormaps["cividis"](float(value))[:3])
            assert np.abs(np.array(pixel[:3]) - expected).max() < 12, (segment, bank, token)


def test_next_block_stops_where_one_is_complete(open_sheet, address):
    figure = open_sheet(address).figure("levels")
    figure.press("Home", "n")
    assert figure.time == 5
    figure.press("n")
    assert figure.time == 11
    figure.press("ArrowUp", *["ArrowUp"] * 8, "ArrowDown")
    assert "0 blocks are complete" in figure.readout and "its own block is 1 full" in figure.readout


def test_hits_say_what_came_back(open_sheet, address, views):
    """Word, place, score and weight of one hit in each head and layer, as the arrays have them."""
    view, figure = views["hits"], open_sheet(address).figure("hits")
    arrays, tokens = view.arrays, view.words["tokens"]
    _, heads, _, hits = arrays["source"].shape
    searched = np.flatnonzero(arrays["search"].all(0) & (np.arange(64) >= 16))
    t = int(searched[searched < 60][-1])
    figure.press("Home", *["ArrowRight"] * t)
    for layer in (0, 1):
        figure.locator.locator('select[data-choice="layer"]').select_option(f"layer {layer}")
        figure.press(*["ArrowUp"] * heads * hits, "ArrowDown")
        for head in range(heads):
            u = arrays["source"][layer, head, t, 1]
            score, weight = (arrays[name][layer, head, t, 1] for name in ("score", "weight"))
            assert f"layer {layer}, head {head}, hit 2 of {hits}: " in figure.readout
            assert f": token {u} “{tokens[u]}” after “{tokens[u - 1]}”" in figure.readout
            assert f"segment {u // 16}, token {u % 16} of it" in figure.readout
            assert f"score {score:.4f}, weight {weight:.4f}" in figure.readout
            assert f"retrieval gate {arrays['gate'][layer, t]:.4f}" in figure.readout
            figure.press("h")
    figure.press("g")
    assert figure.time == arrays["source"][1, 0, t, 1], "g goes to the hit itself"
    quiet = int(np.flatnonzero(arrays["search"][1] == 0)[0])
    figure.press("Home", *["ArrowRight"] * quiet)
    assert "search skipped" in figure.readout


def test_launch_says_and_draws_what_was_recorded(open_sheet, address, views):
    """Two programs: the accesses in words, the bytes so far, an element's history, and its colour."""
    view, figure = views["launch"], open_sheet(address).figure("launch")
    arrays, words = view.arrays, view.words
    figure.press("Home", "n", "n", "n")
    assert figure.time == list(arrays["program"]).index(2), "the last program has no next one"
    figure.press("b", "ArrowRight", "ArrowRight")
    t = list(arrays["program"]).index(1) + 2
    assert figure.time == t and words["names"][arrays["grid"][t]] == "K"
    assert (
        f"Step {t}, line {words['lines'][t]}: {words['says'][t]}. So far {arrays['loaded'][t]:,} bytes loaded"
        in figure.readout
    )
    assert f"{arrays['once'][t]:,} if each were loaded once; {arrays['stored'][t]:,} stored" in figure.readout
    figure.press("g", *["ArrowDown"] * 17, ".", ".")
    assert figure.item == 640 + 17 * 16 + 2
    assert "K[17, 2]: touched once so far, by program 1." in figure.readout
    figure.press(*["ArrowUp"] * 16)
    assert "K[1, 2]: touched 2 times so far, by programs 0, 1." in figure.readout
    figure.settle()
    for item, colour in (
        (0, (196, 196, 196)),
        (40 * 16 + 20 * 16, (213, 94, 0)),
        (40 * 48 - 1, (240, 240, 240)),
    ):
        place = figure.place(t, item)
        pixel = figure.pixel(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
        assert np.abs(np.array(pixel[:3]) - colour).max() < 3, (item, pixel)
    figure.locator.locator('select[data-choice="show"]').select_option("how often each element is touched")
    figure.locator.locator("summary").click()
    rows = [row.split("\t") for row in figure.locator.locator("table").inner_text().splitlines()]
    touched = np.bincount(arrays["elements"][: arrays["starts"][t + 1]], minlength=view.items)[640:1280]
    assert ["K", "640", str((touched > 0).sum()), str(touched.sum()), str(touched.max())] in rows


def test_click_moves_the_cursor(open_sheet, address):
    figure = open_sheet(address).figure("slots")
    place = figure.place(0, 21)
    figure.canvas.click(
        position={"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2}
    )
    assert figure.item == 21 and "slot 21" in figure.readout


def test_next_opening_finds_a_gate_that_opens(open_sheet, address, views):
    gate = views["strips"].arrays["lines"][0]
    openings = [t for t in range(1, len(gate)) if gate[t] >= 0.5 and gate[t - 1] < 0.5]
    assert openings, "the example must have one"
    figure = open_sheet(address).figure("strips")
    figure.press("Home", "n")
    assert figure.time == openings[0]
    figure.locator.get_by_role("button", name="Next opening").click()
    assert figure.time == (openings[1] if len(openings) > 1 else openings[0])


def test_pin_compares_two_tokens(open_sheet, address, views):
    gate = views["strips"].arrays["lines"][0]
    figure = open_sheet(address).figure("strips")
    figure.press("Home", "p", "ArrowRight", "ArrowRight")
    change = gate[2] - gate[0]
    assert f"{'−' if change < 0 else '+'}{abs(change):.4f} against pinned token 0" in figure.readout


def test_views_of_one_stream_are_linked(open_sheet, address):
    sheet = open_sheet(address)
    gates, slots, reading, run = (sheet.figure(k) for k in ("strips", "slots", "reading", "training"))
    ladder = sheet.figure("levels")
    where = run.time
    gates.press("Home", "PageDown", "PageDown", "ArrowRight")
    assert (gates.time, slots.time, reading.time, run.time) == (33, 2, 33, where)
    assert ladder.time == 33, "the same stream, seen by another model"
    slots.press("End")
    assert (gates.time, reading.time) == (48, 48)


def test_choices_change_what_is_drawn(open_sheet, address):
    figure = open_sheet(address).figure("slots")
    before = figure.image()
    figure.locator.locator('select[data-choice="show"]').select_option("age")
    assert figure.image() != before and ": age " in figure.readout.replace("segment 0", "").replace("  ", " ")
    shown = figure.image()
    figure.locator.locator('select[data-choice="order"]').select_option("most first")
    assert figure.image() != shown


def test_numbers_are_there_without_the_picture(open_sheet, address, views):
    figure = open_sheet(address).figure("strips")
    figure.locator.locator("summary").click()
    figure.press("Home")
    cells = figure.locator.locator("td").all_inner_texts()
    assert f"{views['strips'].arrays['lines'][0, 0]:.4f}" in cells
    assert views["strips"].summary in figure.locator.inner_text()
    assert figure.canvas.get_attribute("aria-label").startswith("Gates over time: 64 tokens.")


def test_play_runs_to_the_end_and_stays_quiet_meanwhile(open_sheet, address):
    figure = open_sheet(address).figure("training")
    figure.press("Home", " ")
    figure.wait("f => f.dataset.playing === 'true' && Number(f.dataset.time) > 1")
    assert figure.readout.startswith("step 1:"), "a screen reader is not read every step of an animation"
    figure.press(" ")
    paused = figure.time
    figure.wait("f => f.dataset.playing === 'false'")
    assert figure.readout.startswith(f"step {paused + 1}:")
    figure.press("End", *["ArrowLeft"] * 5)
    figure.locator.get_by_role("button", name="Play").click()
    figure.wait("f => Number(f.dataset.time) === 39 && f.dataset.playing === 'false'", 30)


def test_reduced_motion_plays_at_most_one_step_a_second(open_sheet, address):
    figure = open_sheet(address, reduced_motion="reduce").figure("training")
    figure.press("Home")
    begun, started = figure.time, time.monotonic()
    time.sleep(0.5)
    assert figure.time == begun, "nothing starts by itself"
    figure.press(" ")
    time.sleep(2.5)
    moved, seconds = figure.time - begun, time.monotonic() - started
    assert 1 <= moved <= seconds


def test_pixels_are_the_values(open_sheet, big):
    """A known slot at a known step has cividis' colour for its value, in every bank."""
    from matplotlib import colormaps

    values, address = big
    figure = open_sheet(address).figure("slots")
    figure.press("Home", *["ArrowRight"] * 5)
    figure.settle()
    for slot in (0, 700, 1024, 3333, 5120, 8191):
        place = figure.place(5, slot)
        seen = figure.pixel(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
        expected = 255 * np.array(colormaps["cividis"](float(values[5, slot] / values.max()))[:3])
        assert np.abs(np.array(seen[:3]) - expected).max() < 12, (slot, seen, expected)
        other = 255 * np.array(colormaps["cividis"](float(values[4, slot] / values.max()))[:3])
        if abs(values[5, slot] - values[4, slot]) > 0.3:
            assert np.abs(np.array(seen[:3]) - other).max() > 12, "this is another step's picture"


def test_scrubbing_8192_slots_is_quick(open_sheet, big):
    """From a key to its paint under 50 ms in the median, timed in the page itself."""
    figure = open_sheet(big[1]).figure("slots")
    figure.press("Home")
    delays = []
    for _ in range(40):
        painted = int(figure.data("paints"))
        figure.press("ArrowRight")
        figure.wait(f"f => Number(f.dataset.paints) > {painted}")
        delays.append(float(figure.data("keyToPaint")))
    assert figure.time == 40
    assert sorted(delays)[20] < 50, sorted(delays)


def test_picture_can_be_saved(open_sheet, address, tmp_path):
    sheet = open_sheet(address)
    figure = sheet.figure("reading")
    with sheet.page.expect_download() as saved:
        figure.locator.get_by_role("button", name="Save PNG").click()
    saved.value.save_as(tmp_path / "x.png")
    assert saved.value.suggested_filename == "reading.png"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_narrow_window(open_sheet, address, screenshot):
    """At the width of a phone nothing runs out of the page."""
    sheet = open_sheet(address)
    sheet.page.set_viewport_size({"width": 420, "height": 800})
    for kind in KINDS:
        figure = sheet.figure(kind)
        figure.settle()
        width = figure.locator.evaluate("f => [f.scrollWidth, f.clientWidth]")
        assert width[0] <= width[1] + 1, kind
        screenshot(figure.locator, f"{kind}_narrow")
    sheet.assert_clean()


DRAWN = """figure => new Promise((done) => {
  const canvas = figure.querySelector("canvas"), words = [];
  const proto = CanvasRenderingContext2D.prototype, fill = proto.fillText;
  proto.fillText = function (text, x, y, room) {
    const width = Math.min(this.measureText(text).width, room ?? Infinity);
    const left = x - { left: 0, center: width / 2, right: width }[this.textAlign];
    if (this.canvas === canvas) words.push({ text, left, right: left + width, y });
    return fill.apply(this, arguments);
  };
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  requestAnimationFrame(() => requestAnimationFrame(() => { proto.fillText = fill; done(words); }));
})"""


@pytest.mark.parametrize("width", [1280, 520])
def test_words_stand_below_their_places_or_say_that_they_do_not(open_sheet, tmp_path, width):
    """Sixteen values: wide, each word is under its column; narrow, the cursor's is among those shown."""
    names = [f"v{i}" for i in range(16)]
    save_page(tmp_path / "x.html", strips({"kept": np.linspace(0, 1, 16)}, names, "Kept", unit="value"))
    sheet = open_sheet((tmp_path / "x.html").as_uri())
    sheet.page.set_viewport_size({"width": width, "height": 800})
    figure = sheet.figure("strips")
    figure.settle()
    middles = {w["text"]: (w["left"] + w["right"]) / 2 for w in figure.locator.evaluate(DRAWN)}
    shown = [name for name in names if name in middles]
    if width > 1000:
        places = [figure.place(i, 0) for i in range(16)]
        assert all(abs(middles[n] - p["x"] - p["width"] / 2) < 1 for n, p in zip(names, places, strict=True))
    else:
        assert len(shown) < 16 and names[figure.time] in shown and any("…" in word for word in middles)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1280, 640])
def test_no_words_of_a_line_overlap(open_sheet, address, kind, width):
    sheet = open_sheet(address)
    sheet.page.set_viewport_size({"width": width, "height": 800})
    figure = sheet.figure(kind)
    figure.press("Home")
    figure.settle()
    words = sorted(figure.locator.evaluate(DRAWN), key=lambda w: (w["y"], w["left"]))
    assert len(words) > 4
    for a, b in pairwise(words):
        assert a["y"] != b["y"] or a["right"] <= b["left"] + 1, (a, b)


def test_a_reading_opens_on_its_first_question(views):
    assert views["reading"].time == 50


def test_chapters_say_what_was_recorded_and_pass_axe(open_sheet, tmp_path):
    """Sixteen strips: every value at the cursor is the recording's, and no legend leaves the picture."""
    from axe_playwright_python.sync_playwright import Axe

    torch.manual_seed(0)
    changes = {"memory.chapters.num_chapters": 16}
    model = MemoryTransformer(override(load_config("topics_routed"), changes)).eval()
    with torch.no_grad(), record(model) as trace:
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model(torch.randint(0, 162, (1, 48)))
    save_page(tmp_path / "chapters.html", chapters_over_time(trace, segment_length=16))
    sheet = open_sheet((tmp_path / "chapters.html").as_uri())
    figure = sheet.figure("strips")
    figure.press("Home", "PageDown", *["ArrowUp"] * 16, *["ArrowDown"] * 11)
    want = trace["chapters.probability"].at(layer=0, batch=0).values[16, figure.item]
    assert figure.time == 16 and f"chapter {figure.item} = {want:.4f}" in figure.readout
    figure.locator.locator("summary").click()
    rows = figure.locator.locator("table").inner_text()
    assert all(f"chapter {c}" in rows for c in range(16))
    assert not Axe().run(sheet.page).response["violations"]
    sheet.assert_clean()
