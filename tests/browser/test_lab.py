"""The lab as a person meets it: JupyterLab with its settings and a token, in a real browser."""

from __future__ import annotations

import time
import urllib.error
import urllib.request

import nbformat
import pytest

LIVE = [
    """
from memlib import Trainer, load_config, override, record
from memlib.lab.widgets import Form, gates_over_time, watch
from memlib.lab.widgets.slots import slot_view
import numpy as np

trainer = Trainer(override(load_config("recall_internal"), {"training.max_steps": 100_000}))
example = trainer.task.batch(1, 0, split="test").tokens


def look():
    with record(trainer.model) as trace:
        trainer.model(example)
    return gates_over_time(trace, segment_length=16)


run = watch(trainer, measure=lambda: {"half": 0.5}, look=look, every=3)
run
""",
    "trained = await run.finished()",
    """
def squares(slots, steps):
    return slot_view({"norm": np.full((steps, slots), 2.0, dtype=np.float32)})


form = Form(squares, {"slots": 8}, slots=(4, 40), steps=(2, 6))
form
""",
]


START = "() => { window.ran = window.jupyterapp.commands.execute('notebook:run-all-cells'); }"


@pytest.fixture(scope="module")
def live(lab):
    """A notebook whose run does not end by itself."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s.strip()) for s in LIVE])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, lab.home / "notebooks" / "live.ipynb")
    return "notebooks/live.ipynb"


def test_without_the_token_the_lab_is_shut(lab):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{lab.address}/api/contents", timeout=10)


def test_it_opens_on_the_start_page(lab, open_sheet, screenshot):
    sheet = open_sheet(f"{lab.address}/?token={lab.token}", allowed=lab.address)
    sheet.page.get_by_role("heading", name="Start here").wait_for(timeout=60_000)
    lab.ready(sheet, "notebooks/00_start_here.ipynb")
    screenshot(sheet.page, "start_page")
    sheet.assert_clean()


def test_a_run_is_watched_paused_and_stopped(lab, live, open_sheet, screenshot):
    """The second cell waits for the run; the buttons work all the same, and the kernel is well after."""
    sheet = open_sheet(lab.url(live), allowed=lab.address)
    lab.ready(sheet, live)
    sheet.page.evaluate(START)
    figure = sheet.figure("training")
    figure.wait("f => Number(f.dataset.time) > 5", 60)
    first = figure.image()
    figure.wait("f => Number(f.dataset.time) > 12", 60)
    assert figure.image() != first
    gates = sheet.figure("strips")
    early, drawn = gates.image(), int(gates.data("paints"))
    gates.wait(f"f => Number(f.dataset.paints) > {drawn}", 60)
    assert gates.image() != early, "the gates are those of the model as it trains"

    button = figure.locator.get_by_role("button", name="Pause")
    button.click()
    figure.locator.get_by_role("button", name="Continue").wait_for(timeout=20_000)
    held = figure.time
    time.sleep(1)
    assert figure.time == held
    figure.locator.get_by_role("button", name="One step").click()
    figure.wait(f"f => Number(f.dataset.time) === {held + 1}")
    time.sleep(0.5)
    assert figure.time == held + 1
    screenshot(figure.locator, "live_paused")
    figure.locator.get_by_role("button", name="Continue").click()
    figure.wait(f"f => Number(f.dataset.time) > {held + 3}", 30)
    figure.locator.get_by_role("button", name="Stop").click()

    sheet.page.set_default_timeout(60_000)
    assert sheet.page.evaluate("() => window.ran") is True
    assert lab.ask(sheet, "print(run.state, trained is trainer)") == "stopped True"

    # The widgets of the same notebook answer after the run: the kernel was not wedged.
    squares = sheet.figure("slots")
    assert lab.ask(sheet, "print(form.stage.view.items)") == "8"
    handle = sheet.page.get_by_role("slider").and_(sheet.page.locator(".noUi-handle")).first
    handle.focus()
    before = squares.image()
    handle.press("ArrowRight")
    end = time.monotonic() + 20
    while lab.ask(sheet, "print(form.stage.view.items)") != "9":
        assert time.monotonic() < end, "the slider did not reach the kernel"
    squares.wait("f => f.querySelector('.memlib-about').textContent.startsWith('9 slots')")
    assert squares.image() != before
    sheet.assert_clean()


@pytest.fixture(scope="module")
def shortened(lab):
    """Notebook 03 with one of its six trained models and its control: nbval runs the others."""
    path = "notebooks/03_internal_memory.ipynb"
    notebook = nbformat.read(lab.home / path, as_version=4)
    others = ("for seed in (1, 2)", "for seed in ()")
    assert any(others[0] in cell.source for cell in notebook.cells)
    notebook.cells = [c for c in notebook.cells if "measured[" not in c.source and "_paper" not in c.source]
    for cell in notebook.cells:
        cell.source = cell.source.replace(*others)
    nbformat.write(notebook, lab.home / path)
    return path


def test_notebook_03_runs_and_its_views_answer(lab, shortened, open_sheet, screenshot):
    """Run all, then step, play and click: what is drawn changes, the views move together, nothing fails."""
    path = shortened
    sheet = open_sheet(lab.url(path), allowed=lab.address)
    lab.ready(sheet, path)
    assert lab.run_all(sheet), "a cell failed"
    sheet.page.set_default_timeout(30_000)

    training = sheet.figure("training")
    assert "finished" in training.readout
    gates, slots, text = sheet.figure("strips"), sheet.figure("slots"), sheet.figure("reading")
    gates.press("Home")
    drawn = [figure.image() for figure in (gates, slots, text)]
    scrubber = gates.locator.get_by_role("slider")
    scrubber.focus()
    for _ in range(20):
        scrubber.press("ArrowRight")
    assert gates.time == 20 and "token 20" in gates.readout
    assert (slots.time, text.time) == (1, 20), "the views of one stream move together"
    for figure, before in zip((gates, slots, text), drawn, strict=True):
        assert figure.image() != before
    moved = gates.image()
    gates.locator.get_by_role("button", name="Play").click()
    gates.wait("f => Number(f.dataset.time) > 25")
    gates.locator.get_by_role("button", name="Pause").click()
    assert gates.image() != moved

    text.press("n")
    assert text.time == int(lab.ask(sheet, "print(next(t for t in asked if t > 25))"))
    assert "from token" in text.readout
    screenshot(text.locator, "notebook_03_reading")
    cell = slots.place(0, 40)
    slots.canvas.click(position={"x": cell["x"] + cell["width"] / 2, "y": cell["y"] + cell["height"] / 2})
    assert "slot 40," in slots.readout
    inspector = sheet.figure("inspector")
    whole = inspector.image()
    inspector.locator.locator('select[data-choice="without"]').select_option("this slot")
    assert inspector.image() != whole
    for figure, name in (
        (gates, "gates"),
        (slots, "slots"),
        (inspector, "inspector"),
        (training, "training"),
    ):
        figure.locator.scroll_into_view_if_needed()
        screenshot(figure.locator, f"notebook_03_{name}")
    gates.locator.scroll_into_view_if_needed()
    screenshot(sheet.page, "notebook_03")
    assert lab.ask(sheet, "print(accuracy_memory[0] > 0.99)") == "True", "the kernel answers after all that"
    sheet.assert_clean()
