"""The notebooks' own checks mean something: break the package, and the notebook goes red.

Each mutant is one replaced piece of the package's source, in a copy that stands before the real package on
the import path. The notebook's cells run in a process of their own up to the first red one; for one mutant
nbval runs them too, as `make test` does.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = ["IPython.core.interactiveshell", "anywidget", "matplotlib.pyplot", "nbformat", "pytest", "torch"]
# A comparison, a verdict, or a widget's callback: a cell that is red for another reason caught nothing.
CAUGHT = r"AssertionError|\. NO\n|has no attribute 'times'"

MUTANTS = {
    "all ranks read the same rows": (
        "12_many_processes",
        "training/parallel/ranks.py",
        "return slice(self.data_rank * share, (self.data_rank + 1) * share)",
        "return slice(0, share)",
    ),
    "forget gate pinned to 1": (
        "03_internal_memory",
        "memory/internal.py",
        "self.forget_point(kept)\n        strength = address",
        "kept = torch.ones_like(kept)\n        self.forget_point(kept)\n        strength = address",
    ),
    "segment written before it is read": (
        "03_internal_memory",
        "models/block.py",
        "states = [] if memory is None else self.memories.open(memory, residual.dtype)",
        "own = [] if memory is None else zip(self.memories.memory_list, memory.states, strict=True)\n"
        "        states = [m.write(self.attention_norm(residual), s, memory.mask) for m, s in own]",
    ),
    "reset forgets nothing": (
        "00_start_here",
        "models/state.py",
        "old.where(~rows, new) for old, new",
        "old for old, new",
    ),
    "a shut gate searches all the same": (
        "07_hybrid",
        "memory/external/memory.py",
        "search = gate > self.config.retrieval_threshold",
        "search = torch.ones_like(gate, dtype=torch.bool)",
    ),
    "a slider's callback breaks": (
        "00_start_here",
        "lab/widgets/form.py",
        "widget.observe(lambda _change: self.stage.show(self.view()),",
        "widget.observe(lambda change: self.stage.show(self.view() if change.new != 8 else None),",
    ),
    "values filed one place off": (
        "06_external_memory",
        "memory/external/memory.py",
        'values=rearrange(self.v_proj(hidden), "b n (h k) -> b h n k", h=self.config.num_heads),',
        'values=rearrange(self.v_proj(hidden.roll(1, 1)), "b n (h k) -> b h n k", h=self.config.num_heads),',
    ),
    "the joint softmax forgets the window": (
        "06_external_memory",
        "memory/external/memory.py",
        "merge_weight(heads.logsumexp, torch.logsumexp(hits.score, -1), logit)",
        "torch.sigmoid(torch.logsumexp(hits.score, -1) + logit)",
    ),
    "a segment chooses for itself": (
        "08_chapters",
        "memory/chapters/memory.py",
        "            return before",
        "            return hidden.mean(1, keepdim=True)",
    ),
    "a single chapter's weight does not count": (
        "08_chapters",
        "memory/chapters/memory.py",
        "return log_weights.exp().sum(-1, keepdim=True) * read",
        "return read",
    ),
    "no gradient passes the rounding": (
        "09_low_rank_quantised",
        "memory/chapters/quantization.py",
        "return gradient, None, None",
        "return 0 * gradient, None, None",
    ),
    "halves of a byte are swapped": (
        "09_low_rank_quantised",
        "memory/chapters/quantization.py",
        "return low | (high << 4)",
        "return high | (low << 4)",
    ),
    "attention sees the future": (
        "01_baseline_transformer",
        "nn/attention.py",
        "attention(q, keys, values, mask, causal=mask is None), keys",
        "attention(q, keys, values, mask, causal=False), keys",
    ),
    "what is written is drawn by lot": (
        "04_long_term_memory",
        "memory/ltm.py",
        'self.explored(logit) if self.keep == "learned" else lottery(mask, segments)',
        "lottery(mask, segments)",
    ),
    "banks never decay": (
        "05_hierarchy",
        "memory/hds.py",
        "decay = -math.log(2) * pace",
        "decay = 0 * pace",
    ),
    "a block is seen before it is complete": (
        "05_hierarchy",
        "memory/hds.py",
        "done = total // self.chunk_size",
        "done = (total + 1) // self.chunk_size",
    ),
    "a bank erases nothing where it writes": (
        "04_long_term_memory",
        "memory/ltm.py",
        "return gated_write(slots, strength, strength, tokens.new)",
        "return gated_write(slots, strength, 0 * strength, tokens.new)",
    ),
    "the kernel's sum keeps its old maximum": (
        "11_kernels",
        "memlib_kernels/attention_kernel.py",
        "total = total * shrink + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
    ),
    "a race is not seen": (
        "11_kernels",
        "memlib_kernels/interpreter.py",
        "if seen.setdefault(offset, access.program) != access.program:",
        "if seen.setdefault(offset, access.program) is None:",
    ),
}


THROUGH_NBVAL = "reset forgets nothing"  # a verdict that changes; nbval is what finds it


def nbval(notebook: str, path: Path) -> None:
    """Run a notebook as the tests do, up to its first red cell, with `path` before the real package."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--nbval-lax"]
    command += ["--nbval-current-env", "--nbval-cell-timeout=600", f"notebooks/{notebook}.ipynb"]
    environment = os.environ | {"PYTHONPATH": str(path), "MEMLIB_HOME": str(path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout[-2000:]
    assert "failed" in result.stdout.splitlines()[-1], result.stdout[-2000:]


def first_red(notebook: str, path: str) -> str | None:
    """What nbval would call the first red cell: one that raises, or a verdict that is not as stored.

    Runs in a process that has not imported memlib; None if all cells are green.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    sys.path.insert(0, path)
    os.environ["PYTHONPATH"] = path  # for processes that a notebook starts
    os.chdir(ROOT / "notebooks")
    os.environ["MEMLIB_HOME"] = path
    shell = InteractiveShell.instance()
    for i, cell in enumerate(nbformat.read(f"{notebook}.ipynb", as_version=4).cells):
        if cell.cell_type != "code":
            continue
        with capture_output() as said:
            result = shell.run_cell(cell.source)
        if not result.success:
            return f"cell {i}: {result.error_before_exec or result.error_in_exec!r}"
        stored = "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
        if "nbval-check-output" in cell.metadata.get("tags", []) and said.stdout != stored:
            return f"cell {i}: {said.stdout}"
    return None


@pytest.fixture(scope="module")
def fresh():
    """Processes that start with all imports but memlib's own done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return lambda: ProcessPoolExecutor(1, context)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_package_turns_the_notebook_red(name, fresh, tmp_path):
    notebook, file, old, new = MUTANTS[name]
    for package in (ROOT / "memlib", ROOT / "kernels" / "memlib_kernels"):
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path / file if file.startswith("memlib_kernels/") else tmp_path / "memlib" / file
    source = target.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"the mutant no longer fits {file}"
    target.write_text(source.replace(old, new), encoding="utf-8")
    if name == THROUGH_NBVAL:
        nbval(notebook, tmp_path)
    with fresh() as process:
        red = process.submit(first_red, notebook, str(tmp_path)).result()
    assert red is not None and re.search(CAUGHT, red), red
