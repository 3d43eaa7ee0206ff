"""The doctor: it speaks in every environment, and contradicts the lock only where it is right to."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memlib import doctor


def lock(folder: Path, **pins: str) -> Path:
    """A repository root whose lock has these pins and no others."""
    (folder / "environment").mkdir()
    text = "".join(f"{pin} \\\n    --hash=sha256:{'0' * 64}\n" for pin in pins.values())
    (folder / "environment" / "base.txt").write_text(text)
    return folder


def test_every_row_says_what_it_found_and_what_that_means() -> None:
    rows = doctor.report()
    assert {"Python", "torch", "Triton", "FAISS", "Packages"} <= rows.keys()
    for subject, row in rows.items():
        assert row["value"] and isinstance(row["means"], str), subject
    assert rows["torch"]["value"] == torch.__version__  # the CUDA build's metadata lack its "+cu130"
    assert rows["FAISS"]["value"] == metadata.version("faiss-cpu")


def test_without_any_package_it_still_reports() -> None:
    bare = subprocess.run([sys.executable, "-I", "-S", doctor.__file__], capture_output=True, text=True)
    assert bare.returncode == 1, "the lock beside it names packages, and none is there"
    assert "Traceback" not in bare.stderr
    assert "torch       not installed" in bare.stdout and "make env" in bare.stdout
    assert "more" in bare.stdout.splitlines()[-1], "150 missing packages are not 150 lines"


def test_a_package_that_breaks_on_import_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError(f"lib{name}.so: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", fails)
    row = doctor.report()["FAISS"]
    assert row["value"] == "does not import"
    assert "libfaiss.so" in row["means"]


def test_packages_are_compared_with_the_lock(tmp_path: Path) -> None:
    einops = metadata.version("einops")
    root = lock(
        tmp_path,
        right=f"einops=={einops}",
        wrong="numpy==0.0.1",
        absent="memlib-no-such-package==1.0",
        elsewhere="memlib-nor-this==1.0 ; sys_platform == 'nowhere'",
    )
    row = doctor.report(root)["Packages"]
    assert row["value"] == "3 locked"
    assert row["problems"] == [
        f"numpy {metadata.version('numpy')}, locked 0.0.1",
        "memlib-no-such-package missing, locked 1.0",
    ]


def test_an_extra_may_be_missing_but_not_differ(tmp_path: Path) -> None:
    root = lock(tmp_path, right=f"einops=={metadata.version('einops')}")
    zeros = "0" * 64
    (root / "environment" / "extras.txt").write_text(
        f"memlib-no-such-package==1.0 \\\n    --hash=sha256:{zeros}\n"
        f"numpy==0.0.1 \\\n    --hash=sha256:{zeros}\n"
    )
    problems = doctor.report(root)["Packages"]["problems"]
    assert problems == [f"numpy {metadata.version('numpy')}, locked 0.0.1"]


@pytest.mark.parametrize(("bounds", "fits"), [(">=3.11,<3.14", True), (">=3.8,<3.10", False)])
def test_the_python_is_compared_with_what_the_project_supports(
    tmp_path: Path, bounds: str, fits: bool
) -> None:
    root = lock(tmp_path, right=f"einops=={metadata.version('einops')}")
    (root / "pyproject.toml").write_text(f'[project]\nrequires-python = "{bounds}"\n')
    rows = doctor.report(root)
    assert rows["Python"]["means"].startswith("one of" if fits else "not of the lock's 3.8 to 3.9")
    complaints = [] if fits else [f"Python {platform.python_version()}, locked 3.8 to 3.9"]
    assert rows["Packages"]["problems"] == complaints


def test_without_a_lock_there_is_nothing_to_contradict(tmp_path: Path) -> None:
    row = doctor.report(tmp_path)["Packages"]
    assert row["problems"] == []
    assert "no lock files found" in row["means"]


def test_a_gpu_is_named_with_its_memory() -> None:
    device = SimpleNamespace(name="NVIDIA H100", total_memory=80 * doctor.GIB)
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda _: device
    )
    row = doctor.gpu(SimpleNamespace(cuda=cuda))
    assert row["value"] == "1" and "NVIDIA H100 (80 GiB)" in row["means"]


@pytest.mark.parametrize("problems", [[], ["numpy 1.0, locked 2.0"]])
def test_the_exit_code_follows_the_lock(
    problems: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"Packages": {"value": "1 locked", "means": "", "problems": problems}}
    monkeypatch.setattr(doctor, "report", lambda: rows)
    code = 1 if problems else 0
    assert doctor.main([]) == code
    printed = capsys.readouterr().out
    assert all(problem in printed for problem in problems)
    assert doctor.main(["--json"]) == code
    assert json.loads(capsys.readouterr().out) == rows
