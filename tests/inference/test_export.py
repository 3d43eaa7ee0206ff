"""Exported models: equal to the model, run without memlib in Python and in C++; and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import memlib
from memlib.cli import main
from memlib.config import override
from memlib.inference import export
from memlib.inference.export import check_compiler, export_model, named, weights_sha256
from memlib.models import MemoryTransformer
from memlib.models.stores import attach_stores
from memlib.training.trainer import load_model
from tests.laws.cases import SEGMENT, VOCAB, cases, stir

EXAMPLES = Path(__file__).parents[2] / "examples/export"
CODE = re.findall(r"```bash\n(.*?)```", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.DOTALL)
CASES = {case.name: case for case in cases()}
EVERY = CASES["all-per_layer"]
CASES["hds, ltm, external"] = replace(
    EVERY, kinds={kind: EVERY.kinds[kind] for kind in ("hds", "ltm", "external")}
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="session")
def compiler(lacking):
    try:
        check_compiler()
    except RuntimeError:
        lacking("C++ compiler", "make compiler")


def tiny(case: str) -> MemoryTransformer:
    return stir(MemoryTransformer(override(CASES[case].config(), {"model.num_layers": 1}))).eval()


def tensors(state):
    return [tensor for _, tensor in named(state.memories)]


def same(got, want):
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


# ------------------------------------------------------------------------------------ beside the model


@pytest.mark.slow
@pytest.mark.parametrize("case", ["baseline", "baseline-window", "hds, ltm, external"])
@torch.no_grad()
def test_logits_and_state_are_the_models(case, compiler, tmp_path):
    """Over six segments of three streams, in one layer.

    The state begins with meaningless values. One stream ends early, one begins anew, and a segment that is
    not full is read again with each token.
    """
    model, rows = tiny(case), 3
    step = torch._inductor.aoti_load_package(str(export_model(model, tmp_path / "core.pt2", rows)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (6, rows, SEGMENT), generator=generator)
    flat = [torch.full_like(tensor, 7) for tensor in tensors(model.init_state(rows))]
    full, begins, never = (
        torch.full(shape, v) for shape, v in (((rows, SEGMENT), True), ((rows,), True), ((rows,), False))
    )
    state = None
    for number in range(3):
        outputs = model(ids[number], memory_state=state)
        state = outputs.memory_state
        logits, *flat = step(ids[number], full, begins if number == 0 else never, *flat)
        same([logits, *flat], [outputs.logits, *tensors(state)])

    mask = full.clone()
    mask[0, 2:], mask[1] = False, False
    outputs, before = model(ids[3], mask, memory_state=state), flat
    logits, *flat = step(ids[3], mask, never, *flat)
    same([logits[mask], *flat], [outputs.logits[mask], *tensors(outputs.memory_state)])
    assert all(torch.equal(mine[1], old[1]) for mine, old in zip(flat, before, strict=True))

    anew = torch.tensor([False, False, True])
    state = model.reset(outputs.memory_state, anew)
    for n in range(1, SEGMENT + 1):
        outputs = model(ids[4][:, n - 1 : n], memory_state=state)
        state, mask = outputs.memory_state, torch.arange(SEGMENT).expand(rows, -1) < n
        logits, *after = step(ids[4], mask, anew, *flat)
        same([logits[:, n - 1 : n]], [outputs.logits])
    same(after, tensors(state))
    same(step(ids[5], full, never, *after)[:1], [model(ids[5], memory_state=state).logits])
    if flat:
        with pytest.raises(AssertionError):  # a state that is not passed on
            same(step(ids[5], full, never, *flat)[:1], [model(ids[5], memory_state=state).logits])
    with pytest.raises(RuntimeError, match="index out of bounds"):
        step(ids[0] + VOCAB, full, never, *flat)


# ------------------------------------------------------------------------------------- without memlib


@pytest.fixture(scope="module")
def exported(compiler, tmp_path_factory):
    """A trained run with the default internal memory, exported by the command; and ids of 3.5 segments."""
    folder = tmp_path_factory.mktemp("export")
    run = folder / "run"
    quick = ["training.max_steps=2", "training.batch_size=4", "training.eval_examples=8"]
    assert main(["train", "recall_internal", *quick, "--out", str(run)]) == 0
    assert main(["export", str(run), "--out", str(folder / "core.pt2"), "--batch-size", "2"]) == 0
    model = load_model(run)
    ids = torch.randint(model.config.model.vocab_size, (1, 7 * model.segment_length // 2))
    return folder / "core.pt2", model, ids


def read_by(command, ids, **environment):
    """The logits that a program prints for ids on its standard input: [t v]."""
    text = " ".join(map(str, ids[0].tolist()))
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor([[float(word) for word in line.split()] for line in done.stdout.splitlines()])


def without_memlib(source, folder):
    """A Python program, followed by the check that memlib was not imported."""
    program = folder / "program.py"
    program.write_text(source + '\nassert not any(name.startswith("memlib") for name in sys.modules)\n')
    return [sys.executable, str(program)]


@pytest.mark.slow
@torch.no_grad()
def test_python_reads_a_package_without_memlib(exported, tmp_path):
    package, model, ids = exported
    source = (EXAMPLES / "main.py").read_text()
    checked = {"AOTI_RUNTIME_CHECK_INPUTS": "1"}
    logits = read_by([*without_memlib(source, tmp_path), str(package)], ids, **checked)
    torch.testing.assert_close(logits, model(ids).logits[0], **CLOSE)

    forgetful = source.replace("logits, *state = step", "logits, *_ = step")
    assert forgetful != source
    other = read_by([*without_memlib(forgetful, tmp_path), str(package)], ids)
    n = model.segment_length
    torch.testing.assert_close(other[:n], logits[:n], **CLOSE)
    assert (other[n:] - logits[n:]).abs().max() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_cpp_reads_a_package_without_python(exported, tmp_path):
    package, model, ids = exported
    shutil.copy(EXAMPLES / "main.cpp", tmp_path)
    (build,) = (block for block in CODE if "main.cpp" in block)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", build], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    linked = subprocess.run(["ldd", tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in linked and not {"libpython", "libtorch_python"} & set(
        re.findall(r"lib\w+", linked)
    )
    logits = read_by([str(tmp_path / "main"), str(package)], ids)
    torch.testing.assert_close(logits, model(ids).logits[0], **CLOSE)


@pytest.mark.slow
def test_the_package_describes_itself(exported):
    package, model, _ = exported
    about = torch._inductor.aoti_load_package(str(package)).get_metadata()
    n, vocab = model.segment_length, model.config.model.vocab_size
    states = "\n".join(
        " ".join([name, "float32", *map(str, tensor.shape)])
        for name, tensor in named(model.init_state(2).memories)
    )
    assert about["inputs"] == f"ids int64 2 {n}\nmask bool 2 {n}\nstart bool 2\n{states}"
    assert about["outputs"] == f"logits float32 2 {n} {vocab}\n{states}"
    assert about["format"] == export.FORMAT and about["memlib"] == memlib.__version__
    assert about["weights_sha256"] == weights_sha256(model)
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1e-3
    assert about["weights_sha256"] != weights_sha256(model)
    assert not list(package.parent.glob(".export-*"))


# ------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch, capsys):
    model, path = tiny("baseline"), tmp_path / "core.pt2"
    for wrong, name, rows, said in (
        (
            torch.nn.Linear(2, 2),
            "core.pt2",
            1,
            "a Linear cannot be exported: only the step of a MemoryTransformer",
        ),
        (model, "core.bin", 1, r"core.bin: a package's name ends in .pt2"),
        (model, "core.pt2", 0, "batch size 0: must be at least 1"),
        (
            tiny("baseline").double(),
            "core.pt2",
            1,
            r"is torch.float64 on cpu: .* use model.float\(\).cpu\(\)",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            export_model(wrong, tmp_path / name, rows)
    stored = tiny("external-fusion-oldest-none-per_layer")
    attach_stores(stored)
    with pytest.raises(ValueError, match=r"a store is attached .* detach_stores\(model\) exports"):
        export_model(stored, path)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler found.*apt-get install g\+\+"):
        export_model(model, path)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_package(tmp_path, monkeypatch):
    path = tmp_path / "core.pt2"
    path.write_text("old")
    monkeypatch.setattr(export, "check_compiler", lambda: None)

    def killed(program, package_path, **_):
        Path(package_path).write_text("half")
        raise RuntimeError("killed")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", killed)
    with pytest.raises(RuntimeError, match="killed"):
        export_model(tiny("baseline"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["core.pt2"] and path.read_text() == "old"


def test_the_command_says_how_to_load_the_package(tmp_path, monkeypatch, capsys):
    def write(model, path, batch_size):
        path.write_bytes(bytes(1_500_000))
        return path

    monkeypatch.setattr(export, "export_model", write)
    monkeypatch.setattr("memlib.training.trainer.load_model", lambda folder: tiny("baseline"))
    assert main(["export", str(tmp_path), "--batch-size", "3"]) == 0
    path = tmp_path / "model.pt2"
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{path}: 1.5 MB; reads segments of {SEGMENT} tokens, batch size 3"
    assert f'torch._inductor.aoti_load_package("{path}")' in second and "examples/export" in second


def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["nowhere"], "nowhere: no checkpoint here"),
        (["adapter_smollm2"], "adapter_smollm2: is an adapter"),
    ):
        assert main(["export", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error
