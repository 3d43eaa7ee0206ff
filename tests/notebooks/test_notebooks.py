"""What nbval cannot see: that notebooks ran whole, check something, and stay small and offline.

nbval itself runs every notebook and compares the verdict cells (`make test` passes it the folder).
"""

from __future__ import annotations

import ast
import contextlib
import html
import importlib.util
import io
import json
import linecache
import re
from pathlib import Path

import nbformat
import pytest

from memlib.lab.notebooks import Exercise, exercises

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KILOBYTES = 500
LINES = 25


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook, tag=None):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [c for c in cells if tag is None or tag in c.metadata.get("tags", [])]


def printed(cell) -> str:
    return "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream")


def test_there_are_notebooks():
    numbers = [p.stem[:2] for p in NOTEBOOKS]
    assert numbers == sorted(set(numbers)) and numbers[0] == "00"
    assert len(NOTEBOOKS) >= 4


def test_every_cell_was_run_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_stored_error_and_no_widget_state(notebook):
    assert not [o for c in code_cells(notebook) for o in c.outputs if o.output_type == "error"]
    assert "widgets" not in notebook.metadata
    kinds = {kind for c in code_cells(notebook) for o in c.outputs for kind in o.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds


def test_verdicts(notebook):
    """At least three compared cells; each says yes at least once, and nothing says NO."""
    checked = code_cells(notebook, "nbval-check-output")
    assert len(checked) >= 3
    for cell in checked:
        lines = printed(cell).splitlines()
        assert any(line.endswith(". yes") for line in lines), cell.source
        assert not any(line.endswith(" NO") for line in lines), cell.source


def test_nothing_is_skipped(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"nbval-skip|NBVAL_SKIP|nbval-ignore-output|NBVAL_IGNORE", text)
    assert text.count('"raises-exception"') <= 2


def test_keeps_to_its_budget(notebook):
    """The lesson declares at most 150 CPU-seconds, and the last verdict says they were kept."""
    (setup,) = re.findall(r"Lesson\(\"\d\d\", cpu_seconds=(\d+)\)", "".join(c.source for c in notebook.cells))
    assert int(setup) <= 150
    assert "within the budget" in printed(code_cells(notebook, "nbval-check-output")[-1])


def test_small(path, notebook):
    assert path.stat().st_size <= KILOBYTES * 1000
    long = [c.source for c in code_cells(notebook) if len(c.source.splitlines()) > LINES]
    assert not long, f"cells of more than {LINES} lines:\n{long[:1]}"


def test_every_widget_is_driven(notebook):
    """Near its end a notebook moves every control of every view it shows: nbval sees a broken callback."""
    cells = code_cells(notebook)
    source = "\n".join(cell.source for cell in cells)
    kinds = "Form|watch|strips|gates_over_time|slots_over_time|inspect_slots|reading|reading_over_text"
    kinds += "|fusion_over_time|levels_over_time|hits_view|chapters_over_time|launch_view"
    shown = set(re.findall(rf"^(\w+) = (?:{kinds})\(", source, re.M))
    (driven,) = re.findall(r"moved = drive\(([^)]*)\)", cells[-2].source)
    assert shown and shown <= set(driven.split(", ")), shown
    assert "moved >=" in cells[-1].source


def test_pictures_have_words(notebook):
    """What stays of a widget is a picture with a text, for a code host and for a screen reader."""
    bundles = [o.data for c in code_cells(notebook) for o in c.outputs if "image/png" in o.get("data", {})]
    assert bundles
    for data in bundles:
        assert len(data["text/plain"]) > 40
        assert f'alt="{html.escape(data["text/plain"])}"' in data["text/html"]


def test_a_converted_page_keeps_picture_and_words(notebook):
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_notebook_node(notebook)
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert f'<img alt="{html.escape(output.data["text/plain"])}" src="data:image/png' in page
    assert "widget-view" not in page


def test_installs_and_fetches_nothing(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert not re.search(
        r"[!%]\s*(pip|conda|apt)|urlopen|requests\.|wget|curl |load_dataset|https?://", source
    )


def test_every_class_is_used(notebook):
    """A teaching class that never runs is where teaching material goes wrong."""
    source = "\n\n".join(cell.source for cell in code_cells(notebook))
    classes = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    for name in classes:
        assert re.search(rf"(?<!class )\b{name}(\(|\.apply\()", source), f"class {name} is never used"


def test_predictions_are_compared(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    guesses = re.findall(r"(\w+) = lesson\.predict\(", source)
    assert guesses
    assert [g for g in guesses if f"{g}.compare(" not in source] == []


CASES = [
    pytest.param(p, exercise, id=f"{p.stem[:2]}-{exercise.name.replace(' ', '-')}")
    for p in NOTEBOOKS
    for exercise in exercises(nbformat.read(p, as_version=4))
]


def execute(source: str, namespace: dict[str, object]) -> None:
    """Run a cell with its source known to `inspect`, as in a notebook: Triton reads a kernel's source."""
    name = f"<cell {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


def answer(path: Path, exercise: Exercise, code: str, monkeypatch, folder: Path) -> str:
    """What the check prints when the exercise cell holds `code` (after the setup and define cells)."""
    monkeypatch.setenv("MEMLIB_HOME", str(folder))
    notebook = nbformat.read(path, as_version=4)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for cell in notebook.cells[: exercise.cell]:
        if {"setup", "define"} & set(cell.metadata.get("tags", [])):
            execute(cell.source, namespace)
    execute(code, namespace)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        execute(notebook.cells[exercise.cell + 1].source, namespace)
    return said.getvalue()


@pytest.mark.parametrize(("path_", "exercise"), CASES)
def test_solution_passes_and_wrong_answer_fails(path_, exercise, monkeypatch, tmp_path, request):
    if path_.stem == "10_pretrained":
        request.getfixturevalue("peer")("transformers")
    if path_.stem == "11_kernels":
        pytest.importorskip("triton", reason="Triton exists for Linux only")
    stub = nbformat.read(path_, as_version=4).cells[exercise.cell].source
    assert answer(path_, exercise, stub, monkeypatch, tmp_path).startswith("○")
    assert answer(path_, exercise, exercise.solution, monkeypatch, tmp_path).startswith("✓")
    assert answer(path_, exercise, exercise.wrong, monkeypatch, tmp_path).startswith("✗")


def test_without_triton_the_kernels_say_so(monkeypatch):
    """Triton is published for Linux only: notebook 11 stops with a message, 02 goes on without a picture."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )
    cells = {
        number: code_cells(nbformat.read(ROOT / "notebooks" / name, as_version=4))
        for number, name in ((2, "02_flash_attention.ipynb"), (11, "11_kernels.ipynb"))
    }
    with pytest.raises(ImportError, match=r"Linux only: read the stored outputs"):
        execute(cells[11][0].source, {"__name__": "__main__"})
    namespace: dict[str, object] = {"__name__": "__main__"}
    execute(cells[2][0].source, namespace)
    (tiles,) = (cell for cell in cells[2] if cell.source.startswith("def kernel_tiles"))
    execute(tiles.source + "\n\nshown = kernel_tiles(64, tile=16, step=18)", namespace)
    assert "Linux only" in str(namespace["shown"])


def test_every_notebook_has_exercises(notebook):
    assert len(exercises(notebook)) >= 2


def test_a_stored_table_is_the_results_file():
    """Notebook 06 shows passkey figures that it does not measure itself: they are those of the file."""
    notebook = nbformat.read(ROOT / "notebooks" / "06_external_memory.ipynb", as_version=4)
    (cell,) = (c for c in code_cells(notebook) if c.source.startswith("PASSKEY = "))
    shown = ast.literal_eval(ast.parse(cell.source).body[0].value)
    measured: dict[str, dict[int, list[float]]] = {}
    for result in json.loads((ROOT / "docs/results/passkey.json").read_text(encoding="utf-8"))["results"]:
        for segments, accuracy in result["accuracy"].items():
            measured.setdefault(result["name"], {}).setdefault(int(segments), []).append(accuracy)
    assert shown == measured


def test_names_the_plain_kernel(path):
    """Stored metadata names the plain kernel, so that any environment can open the notebook."""
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
