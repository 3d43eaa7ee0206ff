"""What can be said of the image without an engine: `make image-test` says the rest, of a built one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "environment" / "entrypoint.sh"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEVCONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, **options)


def test_hadolint_finds_nothing() -> None:
    linted = run(Path(sys.executable).parent / "hadolint", "--no-color", ROOT / "Dockerfile")
    assert linted.stdout + linted.stderr == ""


def test_the_dockerfile_needs_neither_buildkit_nor_an_address() -> None:
    instructions = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M)
    assert not re.search(r"--mount|--link|--chmod|<<|^# syntax", DOCKERFILE, re.M)
    assert re.findall(r"\w+://[^/']+", instructions) == ["http://127.0.0.1:"]


def test_the_base_is_the_python_of_the_lock() -> None:
    (version,) = re.findall(r"^ARG BASE_IMAGE=python:([\d.]+)-slim-bookworm$", DOCKERFILE, re.M)
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert table["project"]["requires-python"].startswith(f">={version},")
    assert set(re.findall(r"python3\.\d+", DOCKERFILE)) == {f"python{version}"}


def test_packages_come_from_the_lock_files_that_make_env_installs() -> None:
    installs = re.findall(r"pip install (.*)", DOCKERFILE.replace("\\\n", " "))
    locked, project = installs[:2], installs[2]
    assert [re.search(r"-r (\S+)", line)[1] for line in locked] == ["base.txt", "torch-${TORCH}.txt"]
    assert all("--no-deps --require-hashes" in line for line in locked)
    assert "--no-index --no-deps" in project and len(installs) == 3


def test_what_is_copied_exists() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M)
    sources = {
        source.replace("${TORCH}", torch)
        for line in copies
        for source in line.split()
        for torch in ("cpu", "cuda")
    }
    optional = {"environment/wheelhous[e]"}
    assert optional < sources
    assert [source for source in sources - optional if not (ROOT / source).exists()] == []


def kept_out(path: str) -> bool:
    """Whether .dockerignore keeps a path, or a folder above it, out of the build."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    expressions = [re.escape(p).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*") for p in patterns]
    return re.match(rf"({'|'.join(expressions)})(/|$)", path) is not None


@pytest.mark.parametrize(
    "path",
    [".git/HEAD", ".venv/bin/python", "local.mk", "runs/a/log.jsonl", "memlib/lab/__pycache__/trace.pyc"],
)
def test_the_build_does_not_see(path: str) -> None:
    assert kept_out(path)


def test_the_build_sees_what_git_keeps_and_nothing_else() -> None:
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"]
    seen = [line for line in ignored if not kept_out(line.strip("/").replace("*", "name"))]
    assert seen == ["/environment/wheelhouse/"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git, or no checkout of it: no list of the files that it keeps")
    kept = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
    assert kept and [path for path in kept if kept_out(path)] == []


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder, and programs that say how they were called in place of the real ones."""
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("python", "make", "memlib"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*"; echo "in $PWD, work $MEMLIB_WORK, home $HOME"\n')
        program.chmod(0o755)
    return tmp_path / "home"


def enter(home: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The entry script with `home` as HOME, unless `environ` has another."""
    programs = f"{home.parent / 'bin'}:{os.environ['PATH']}"
    environ = {"PATH": programs, "HOME": str(home), "TMPDIR": str(home.parent)} | environ
    return run("bash", ENTRY, *command, env=environ)


def test_the_lab_is_what_a_container_runs(home: Path) -> None:
    work = home / "work"
    for arguments in ((), ("lab",)):
        entered = enter(home, *arguments)
        said = f"python -m jupyterlab --ip=0.0.0.0 --no-browser\nin {work}, work {work}, home {home}\n"
        assert entered.stdout == said and entered.stderr == ""
    assert enter(home, "lab", "--port=9").stdout.startswith(
        "python -m jupyterlab --ip=0.0.0.0 --no-browser --port=9\n"
    )


def test_subcommands(home: Path) -> None:
    tests = enter(home, "test", "PYTEST_ARGS=-k recall").stdout
    assert tests.startswith(f"make -C {ROOT} BIN={home.parent / 'bin'} ENV= CI= test PYTEST_ARGS=-k recall\n")
    assert enter(home, "doctor", "--json").stdout.startswith("memlib doctor --json\n")
    assert not (home / "work").exists(), "neither needs the work folder"
    assert enter(home, "shell", "-c", "pwd; echo $0").stdout == f"{home / 'work'}\nbash\n"
    assert enter(home, "echo", "a  b").stdout == "a  b\n"
    assert enter(home, "no-such-command").returncode == 127
    assert enter(home, "sh", "-c", "exit 3").returncode == 3


def test_the_first_start_copies_the_notebooks_and_later_ones_keep_them(home: Path) -> None:
    copies = home / "work" / "notebooks"
    enter(home, "true")
    assert sorted(path.name for path in copies.glob("*.ipynb")) == NOTEBOOKS
    assert (copies / NOTEBOOKS[0]).read_bytes() == (ROOT / "notebooks" / NOTEBOOKS[0]).read_bytes()
    (copies / NOTEBOOKS[0]).write_text("mine")
    (copies / NOTEBOOKS[1]).unlink()
    (copies / "notes.md").write_text("mine too")
    assert enter(home, "true").stderr == ""
    assert (copies / NOTEBOOKS[0]).read_text() == "mine" and (copies / "notes.md").read_text() == "mine too"
    assert (copies / NOTEBOOKS[1]).exists(), "a notebook that a newer image brings is added"


def test_a_work_folder_that_cannot_be_written_is_said_and_survived(home: Path) -> None:
    (home / "work").write_text("not even a folder: no user, root included, can write in it")
    entered = enter(home)
    for part in (f"{home / 'work'} cannot be written", '--user "$(id -u)" --group-add users', "-v memlib:"):
        assert part in entered.stderr
    elsewhere = Path(re.search(r"in (\S+), work \1,", entered.stdout)[1])
    assert entered.returncode == 0 and elsewhere.parent == home.parent
    assert sorted(path.name for path in (elsewhere / "notebooks").glob("*.ipynb")) == NOTEBOOKS


def test_without_a_home_there_is_one_for_as_long_as_the_container(home: Path) -> None:
    missing = str(home / "missing")
    replacement = Path(re.search(r"home (\S+)", enter(home, "doctor", HOME=missing).stdout)[1])
    assert replacement.is_dir() and replacement.parent == home.parent
    refused = enter(home, "doctor", HOME=missing, TMPDIR=missing)
    assert refused.returncode == 1
    assert f"Neither {missing} nor /tmp" in refused.stderr and "Add: --tmpfs /tmp" in refused.stderr


def test_the_devcontainer_is_this_image() -> None:
    build = DEVCONTAINER["build"]
    folder = ROOT / ".devcontainer"
    assert (folder / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (folder / build["context"]).resolve() == ROOT
    assert set(build["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
    assert f"ARG NB_USER={DEVCONTAINER['remoteUser']}\n" in DOCKERFILE
    assert f"EXPOSE {DEVCONTAINER['forwardPorts'][0]}\n" in DOCKERFILE
    python = DEVCONTAINER["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert f"venv --prompt memlib {Path(python).parents[1]} " in DOCKERFILE.replace("\\\n", "\\\n ")


def test_the_devcontainer_takes_a_gpu_only_where_there_is_one() -> None:
    assert DEVCONTAINER["hostRequirements"]["gpu"] == "optional"
    assert "--gpus" not in json.dumps(DEVCONTAINER)


def plan(*arguments: str, **environ: str) -> str:
    """What make would do."""
    command = ("make", "--no-print-directory", "--dry-run", *arguments)
    return run(*command, cwd=ROOT, env=os.environ | environ).stdout.replace("\\\n", "")


def test_make_uses_the_environment_of_the_devcontainer() -> None:
    planned = plan("test-fast", "PYTEST_ARGS=", **DEVCONTAINER["containerEnv"])
    assert planned.startswith('/opt/venv/bin/python -m pytest -m "not slow"')


def test_binder_builds_the_same_dockerfile() -> None:
    """It looks in these folders first; without them it takes the root's Dockerfile, and names the user."""
    assert not (ROOT / "binder").exists() and not (ROOT / ".binder").exists()
    assert {"ARG NB_USER=jovyan", "ARG NB_UID=1000"} <= set(DOCKERFILE.splitlines())
    assert "jupyterlab==" in (ROOT / "environment" / "base.txt").read_text()


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_make_hands_the_engine_what_it_needs(engine: str) -> None:
    options = ("BUILD_ARGS=--pull", "RUN_ARGS=--gpus all", "TEST_ARGS=-k token", "LAB_ARGS=")
    planned = plan("image", "image-run", "image-test", f"ENGINE={engine}", "TORCH=cuda", *options)
    assert f"BUILDAH_FORMAT=docker {engine} build --build-arg TORCH=cuda --pull -t memlib:cuda ." in planned
    assert "-p 127.0.0.1:8888:8888" in planned and "--gpus all memlib:cuda lab" in planned
    assert ("--userns=keep-id" in planned) == (engine == "podman")
    assert f"check.py --engine {engine} --torch cuda -k token memlib:cuda" in planned


def test_the_recorded_check_is_of_today_s_checks() -> None:
    page = (ROOT / "docs" / "image.md").read_text()
    checks = re.findall(r"^@check\ndef (\w+)", (ROOT / "tests" / "image" / "check.py").read_text(), re.M)
    recorded = re.findall(r"^ *\d+\.\d s  (.+)$", page, re.M)
    assert recorded == [name.replace("_", " ") for name in checks]
    assert "\nall hold\n" in page
