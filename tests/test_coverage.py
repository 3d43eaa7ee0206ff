"""docs/coverage.md is true: its paths, names, defaults, counts and figures are those of the package.

In a table of the page the first column quotes a document and is not checked. In the others, a path stands in
backticks from the repository root, and a name is defined in a file of the same cell, or is public, a
configuration field, a command or a make target.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import memlib
from memlib.cli import build_parser
from memlib.config import Config, ConfigError, override, reference
from memlib.config.fields import convert
from memlib.evaluation.capacity import capacity, designs
from memlib.ops import memory_attention_weights

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
STATUSES = ("done", "differs", "to come")
HEAD = ["asks", "status", "code", "notebook", "test", "what differs, what is to come"]
SUFFIXES = (".py", ".md", ".ipynb", ".yaml", ".json", ".toml", ".txt")


def tables(text):
    """(document, head, rows) of each table, the document being the last heading of level two."""
    found, document, rows = [], "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("## "):
            document = line.removeprefix("## ")
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif rows:
            found.append((document, rows[0], rows[2:]))
            rows = []
    return found


TABLES = tables(PAGE)
ROWS = [(document, *row) for document, head, rows in TABLES if head == HEAD for row in rows]
COUNTS = next(rows for _, head, rows in TABLES if head[-1] == "rows")


def backticked(cell):
    return re.findall(r"`([^`]+)`", cell)


def is_path(word):
    return "/" in word or word.endswith(SUFFIXES)


@cache
def definitions(file):
    """Names that a Python file defines: classes, functions, constants, and members as Class.member."""
    if not file.endswith(".py"):
        return set()
    found = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    visit(ast.parse((ROOT / file).read_text(encoding="utf-8")).body, "")
    return found


def defined_elsewhere(word, folder):
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py"))
    return [file for file in files if word in definitions(file)]


@cache
def fields():
    """Configuration path -> default, None for groups."""
    return {path: None if kind == "group" else yaml.safe_load(d) for path, kind, d, _ in reference()}


def type_of(path):
    kind = Config
    for name in path.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def commands():
    (parsers,) = (a for a in build_parser()._actions if hasattr(a, "choices") and a.choices)
    return set(parsers.choices)


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def value_complaint(path, value):
    try:
        convert(yaml.safe_load(value), type_of(path), path)
    except ConfigError as error:
        return str(error)
    return None


def complaint(word, files, folder):
    """What is wrong with a word in backticks; None where it is found."""
    if is_path(word):
        return None if (ROOT / word).exists() else "no such path"
    if word.startswith("memlib "):
        return None if word.split()[1] in commands() else "no such command"
    if word.startswith("make "):
        return None if word.split()[1] in make_targets() else "no such target"
    path, colon, value = word.partition(": ")
    if path in fields():
        return value_complaint(path, value) if colon else None
    if word in memlib.__all__ or any(word in definitions(file) for file in files):
        return None
    return f"not in {files or 'memlib'}; defined in {defined_elsewhere(word, folder) or 'no file'}"


def test_there_are_five_documents():
    titles = [row[0] for row in COUNTS[:-1]]
    assert titles == list(dict.fromkeys(document for document, *_ in ROWS)) and len(titles) == 5


def test_the_counts_are_those_of_the_rows():
    for title, *stated in COUNTS:
        found = [row[2] for row in ROWS if title in (row[0], "all")]
        assert [int(n) for n in stated] == [*map(found.count, STATUSES), len(found)], title


def complaints(row):
    """All that is wrong with a row's status, paths and names."""
    _, _, status, code, notebook, test, note = row
    found = [] if status in STATUSES else [f"status {status!r}"]
    if status != "to come" and not backticked(code):
        found.append("what exists has code")
    if status == "differs" and note == "–":
        found.append("what differs is not said")
    code_files = [word for word in backticked(code) if (ROOT / word).is_file()]
    for cell, folder, more in (
        (code, "memlib", []),
        (notebook, "notebooks", []),
        (test, "tests", []),
        (note, "memlib", code_files),
    ):
        words = backticked(cell)
        files = more + [word for word in words if (ROOT / word).is_file()]
        found += [f"{word}: {said}" for word in words if (said := complaint(word, files, folder))]
    found += [f"{word}: no notebook" for word in backticked(notebook) if not word.endswith(".ipynb")]
    found += [f"{word}: no test" for word in backticked(test) if not word.startswith(("tests/", "test_"))]
    return found


def default_complaint(row):
    """Of a row that begins with a field and its default, as a dataclass or as YAML has it."""
    _, asks, status, code, *_ = row
    found = re.match(r"`(?:\w+\.)?(\w+): (?:[\w\[\]]+ = )?([^`]+)`$", asks.partition(" (")[0])
    if not found or status == "to come":
        return None
    name, text = found.groups()
    path = next(word for word in backticked(code) if word in fields())
    asked, mine = yaml.safe_load({"None": "null"}.get(text, text)), fields()[path]
    same = path.endswith(f".{name}") and asked == (str(mine) if isinstance(asked, str) else mine)
    if isinstance(mine, float) and isinstance(asked, str):  # YAML 1.1 reads 1e-4 as text
        same = path.endswith(f".{name}") and float(asked) == mine
    if status == "done":
        return None if same else f"{path} is {mine!r}, the document has {name} = {asked!r}"
    return f"{path} is as the document has it" if same and " = " in asks else None


def signature_complaint(row):
    """Of a row that begins with a public name and its arguments."""
    _, asks, status, *_ = row
    found = re.match(r"`(\w+)\(([^`]*)\)(?: -> \w+)?`", asks)
    if not found or status != "done":
        return None
    mine = inspect.signature(getattr(memlib, found[1])).parameters
    asked = ast.parse(f"def asked({found[2].replace(', ...', '').replace('...', '')}): ...").body[0].args
    names = [argument.arg for argument in asked.args]
    defaults = dict(zip(reversed(names), map(ast.literal_eval, reversed(asked.defaults)), strict=False))
    if list(mine)[: len(names)] == names and all(mine[n].default == d for n, d in defaults.items()):
        return None
    return f"the arguments are {', '.join(map(str, mine.values()))}"


def test_paths_names_and_statuses():
    assert [(row[1], found) for row in ROWS if (found := complaints(row))] == []


def test_defaults_that_are_done_are_the_documents():
    assert [(row[1], found) for row in ROWS if (found := default_complaint(row))] == []


def test_functions_that_are_done_take_the_documents_arguments():
    assert [(row[1], found) for row in ROWS if (found := signature_complaint(row))] == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("", "", "done", "`memlib/nowhere.py`", "–", "–", "–"), "no such path"),
        (("", "", "done", "–", "–", "–", "–"), "what exists has code"),
        (("", "", "differs", "`memlib/__init__.py`", "–", "–", "–"), "what differs is not said"),
        (("", "", "half", "`memlib/__init__.py`", "–", "–", "–"), "status 'half'"),
        (("", "", "done", "`memlib/__init__.py` `Gate`", "–", "–", "–"), r"defined in \['memlib/"),
        (("", "", "done", "`memlib/nn/mlp.py` `MLP.read`", "–", "–", "–"), "defined in no file"),
        (("", "", "done", "`memory.fusion: sum`", "–", "–", "–"), "expected one of softmax"),
        (("", "", "done", "`memlib paint`", "–", "–", "–"), "no such command"),
        (("", "", "to come", "–", "–", "`tests/test_cli.py` `test_nothing`", "–"), "test_nothing: not in"),
    ],
)
def test_a_false_row_is_caught(row, said):
    assert any(re.search(said, found) for found in complaints(row))


def test_a_false_default_or_signature_is_caught():
    code = "`memory.chapters.num_chapters`"
    assert "is 16, the document has" in default_complaint(("", "`num_chapters: int = 100`", "done", code))
    assert "as the document has" in default_complaint(("", "`num_chapters: int = 16`", "differs", code))
    assert signature_complaint(("", "`set_seed(number)`", "done"))
    assert signature_complaint(("", "`create_memory_bank(num_tokens, dim, use_low_rank=True)`", "done"))


def test_paths_in_the_text_exist():
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith(("|", "#")))
    assert all((ROOT / word).exists() for word in backticked(text) if is_path(word))


# --------------------------------------------------------------------------- figures of the documents


def places(kind, *parts):
    return sum(designs()[kind].part(name).places for name in parts)


def values(kind, *parts):
    return sum(designs()[kind].part(name).values for name in parts)


BANKS, BLOCKS, RING, STORE = "level 3, banks", "level 1, blocks", "ring", "store"


def bank_parameters(**options):
    with torch.device("meta"):
        return memlib.count_parameters(memlib.create_memory_bank(4096, 4096, rank=512, **options))


def standard():
    with torch.device("meta"):
        bank = memlib.create_memory_bank(4096, 4096)
    return f"{memlib.count_parameters(bank):,} parameters, {bank.nbytes:,} bytes in float32"


def times_less(**options):
    mine = bank_parameters(use_low_rank=True, **options)
    return f"{mine:,} parameters, {bank_parameters() / mine:g}× less"


def undivided():
    with pytest.raises(ConfigError, match=r"num_chapters = 100: must divide"):
        override(Config(), {"memory.kinds": ["chapters"], "memory.chapters.num_chapters": 100})
    tokens = Config().memory.chapters.num_memory_tokens
    return f"{tokens:,} = 100 × {tokens // 100} + {tokens % 100}"


def attention_operations(blocks, n=64, d=32):
    """Operations of Q Kᵀ and of the weighted sum, with the queries cut into blocks."""
    q, k = torch.randn(1, 1, n, d), torch.randn(1, 1, n, d)
    with FlopCounterMode(display=False) as counter:
        for part in q.chunk(blocks, 2):
            memory_attention_weights(part, k) @ k
    return counter.get_total_flops()


def in_all():
    sequence, banks = designs()["design"].part(BLOCKS).tokens, places("design", BANKS)
    return f"{sequence:,} + {banks:,} = {sequence + banks:,}"


def below_level_3():
    return f"{places('design', BLOCKS)} block means and {places('design', 'level 2, summary')} summary"


def in_a_batch():
    """The state of one stream in a batch of 16 is a sixteenth of the batch's."""
    held = places("prototype", RING, STORE)
    with torch.device("meta"):
        ring = memlib.MEMORIES["ring"](Config().memory.ring, 64)
        assert ring.init_state(16).nbytes == 16 * ring.init_state(1).nbytes
    return f"{held:,} tokens per stream, {held / 1e6:.2%}"


def share_of_the_design():
    parts = (("prototype", RING, STORE), ("design", BANKS))
    (few, many), (small, large) = ([count(*part) for part in parts] for count in (places, values))
    return f"{few / many:.1%} of the places, {small / large:.0%} of the values"


def more_slots():
    large = capacity("ring", 64, long_slots=2048).part(STORE).places
    return f"{large:,} / {places('prototype', STORE)} = {large // places('prototype', STORE)}"


FIGURES = {
    "Standard: 4096 × 4096 = 67M params": standard,
    "Factorized: 16× less": lambda: times_less(low_rank_mode="factorized"),
    "ReducedDim: 32× less": lambda: times_less(low_rank_mode="reduced_dim"),
    "num_memory_tokens 1024, num_chapters 100": undivided,
    "Flash attention: time O(n²d/B)": lambda: (
        f"{attention_operations(1):,} operations in 1 block, {attention_operations(4):,} in 4 blocks"
    ),
    "32K + 8K = 40,192 tokens": in_all,
    "Level 0-2: seq_len tokens (32K max)": below_level_3,
    "Batch of 16: ~8,192 / 1M = 0.8%": in_a_batch,
    "num_memories dimension missing (8x capacity loss)": lambda: (
        f"{places('design', BANKS):,} / {places('prototype', STORE)} = "
        f"{places('design', BANKS) // places('prototype', STORE)}"
    ),
    "~12% of designed capacity": share_of_the_design,
    "2048 slots vs 512 (2x boost)": more_slots,
    "σ(0.5) ≈ 0.62": lambda: f"{1 / (1 + math.exp(-Config().memory.external.retrieval_gate_init)):.4f}",
    "(N_m + d) × r = 8192 × 512 = 4.2M params": lambda: f"{bank_parameters(use_low_rank=True):,}",
    "N_m × r = 4096 × 512 = 2.1M params": lambda: (
        f"{bank_parameters(use_low_rank=True, low_rank_mode='reduced_dim'):,}"
    ),
    "8 × 1,024 = 8,192": lambda: f"{places('design', BANKS):,}",
    "512 + 512 = 1,024": lambda: f"{places('prototype', RING, STORE):,}",
    "8,192 / 1M = 0.8%, 1,024 / 1M = 0.1%": lambda: (
        f"{places('design', BANKS) / 1e6:.2%}, {places('prototype', RING, STORE) / 1e6:.2%}"
    ),
}
STATED = {row[1]: row[2] for _, head, rows in TABLES if "figure" in head for row in rows}


def test_every_figure_is_computed():
    assert list(STATED) == list(FIGURES)


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_what_the_package_computes(figure):
    assert STATED[figure] == FIGURES[figure]()
