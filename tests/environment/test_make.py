"""The lock files, the Makefile and the lab's server: what a person meets before any notebook."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
import websocket
import yaml

from ..run import Count, worst

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "environment").glob("*.txt"))


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_help_has_a_line_for_each_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", makefile, re.M)[1].replace("\\\n", " ").split()
    listed = dict(re.findall(r"^  make ([a-z-]+) +(\S.*)$", run("make", "help").stdout, re.M))
    assert sorted(listed) == sorted(phony)
    assert run("make").stdout == run("make", "help").stdout


def test_an_unknown_build_of_torch_is_refused() -> None:
    refused = run("make", "env", "TORCH=rocm")
    assert refused.returncode != 0
    assert "TORCH=rocm" in refused.stderr and "cpu and cuda" in refused.stderr


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([5, 0], 0), ([0, 5], 0), ([5, 5], 5), ([1, 0], 1), ([0, 1], 1), ([2], 2)],
)
def test_either_call_of_pytest_fails_the_run_unless_it_only_selected_nothing(codes, code) -> None:
    assert worst(codes) == code


def test_the_closing_line_counts_both_calls() -> None:
    count = Count()
    for stats in ({"passed": [1, 2], "failed": [3]}, {"passed": [4], "error": [5], "xfailed": [6]}):
        count.pytest_terminal_summary(SimpleNamespace(stats=stats))
    assert str(count) == "3 passed, 2 failed, 1 skipped"


def test_the_hooks_run_what_ci_checks() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "nothing is fetched"
    entries = " ".join(hook["entry"] for hook in hooks[0]["hooks"])
    checks = re.findall(r"^make (lint|types|.*-check)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert len(checks) == 4 and all(f" {check}" in entries for check in checks)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what lock.py and env.sh read, to damage."""
    shutil.copytree(ROOT / "environment", tmp_path / "environment")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def command(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_env_names_the_python_it_found_and_the_command_that_brings_one(tree: Path) -> None:
    old = command(tree / "python3", '[ "$1" = --version ] && echo Python 3.9.2 || exit 1')
    refused = run("bash", "environment/env.sh", "cpu", str(old), cwd=tree)
    assert refused.returncode != 0
    for part in ("needs Python 3.11 to 3.13", "found Python 3.9.2", "make env PYTHON=", " install "):
        assert part in refused.stderr


@pytest.mark.parametrize("minor", [10, 11, 12, 13, 14])
def test_env_takes_each_python_that_pyproject_allows(tree: Path, minor: int) -> None:
    """The Python here stands for all: it says that it is 3.`minor`, and has no ensurepip."""
    pretend = f"import sys; sys.version_info = (3, {minor}); sys.modules['ensurepip'] = None"
    stub = command(
        tree / "python", f'[ "$1" = -c ] && exec {sys.executable} -c "{pretend}; $2" "$@" || echo 3.{minor}'
    )
    refused = run("bash", "environment/env.sh", "cpu", str(stub), cwd=tree)
    taken = f"apt-get install python3.{minor}-venv" in refused.stderr and "no ensurepip" in refused.stderr
    assert taken == (minor in (11, 12, 13)), refused.stderr


def check_lock(root: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "environment/lock.py", "--check", cwd=root)


def test_the_lock_satisfies_pyproject() -> None:
    assert check_lock(ROOT).returncode == 0, check_lock(ROOT).stderr


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "complaint"),
    [
        ("base.txt", r"^einops==.*\\\n( +--hash.*\n)+", "", "no pin for einops"),
        ("base.txt", r"^setuptools==.*\\\n( +--hash.*\n)+", "", "no pin for setuptools"),
        ("base.txt", r"^einops==[^ ]+", "einops==0.7.9", "einops==0.7.9 is not >=0.8.2"),
        ("base.txt", r"^(einops==.*) \\\n( +--hash.*\n)+", r"\1\n", "nor its hash: einops=="),
        ("torch-cpu.txt", r"^triton==[^ ]+", "triton==3.8.0", "triton==3.8.0 is not ==3.7.1"),
        ("torch-cpu.txt", r"3fbf9c9d1f3c", "000000000000", "torch's CPU build for Python 3.13"),
        ("torch-cuda.txt", r"^torch==[^ ]+", "torch==2.14.0", "torch==2.14.0 is not >=2.13,<2.14"),
        ("extras.txt", r"^peft==.*\\\n( +--hash.*\n)+", "", "no pin for peft"),
        ("evaluation.txt", r"^lm-eval==.*\\\n( +--hash.*\n)+", "", "no pin for lm-eval"),
        ("base.txt", r"\A", "--index-url https://example.org/simple\n", "--index-url"),
    ],
)
def test_a_lock_that_falls_short_is_refused(
    tree: Path, file: str, pattern: str, replacement: str, complaint: str
) -> None:
    path = tree / "environment" / file
    damaged, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.M)
    assert count == 1
    path.write_text(damaged)
    refused = check_lock(tree)
    assert refused.returncode != 0
    assert complaint in refused.stderr and file in refused.stderr and "make lock" in refused.stderr


def test_a_dependency_without_a_pin_is_refused(tree: Path) -> None:
    pyproject = tree / "pyproject.toml"
    pyproject.write_text(
        pyproject.read_text().replace("dependencies = [", 'dependencies = [\n    "jax>=0.4",', 1)
    )
    assert "no pin for jax" in check_lock(tree).stderr


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locks_name_no_place_but_the_index_of_cpu_builds(lock: Path) -> None:
    addresses = re.findall(r"^(?:.*://.*|-.*)$", lock.read_text(), re.M)
    allowed = ["--extra-index-url https://download.pytorch.org/whl/cpu"]
    assert addresses == (allowed if lock.name == "torch-cpu.txt" else [])


@dataclass
class Lab:
    url: str
    log: Path

    def get(self, path: str, token: bool = True, **options: object) -> tuple[int, str]:
        """Status and body of the server's answer."""
        address = urlsplit(self.url)
        headers = {"Authorization": "token " + parse_qs(address.query)["token"][0]} if token else {}
        request = urllib.request.Request(f"http://{address.netloc}{path}", headers=headers, **options)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """`make lab` as a person without any Jupyter settings would start it, with this Python."""
    home = tmp_path_factory.mktemp("home")
    log = home / "lab.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = re.compile("JUPYTER|IPYTHON|XDG_|OMP_|MAKE|MFLAGS")
    environ = {k: v for k, v in os.environ.items() if not ours.match(k)} | {"HOME": str(home)}
    command = ["make", "lab", f"BIN={Path(sys.executable).parent}", "ENV="]
    command += [f"LAB_ARGS=--no-browser --ServerApp.port={port} --ServerApp.port_retries=0"]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://\S+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Lab(found[0], log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def test_the_lab_prints_one_address_with_a_token_of_its_own(lab: Lab) -> None:
    assert re.findall(r"\w+:/\S+", lab.log.read_text()) == [lab.url]
    address = urlsplit(lab.url)
    assert address.hostname == "127.0.0.1"
    assert address.path == "/lab/tree/notebooks/00_start_here.ipynb"
    assert re.fullmatch(r"[0-9a-f]{48}", parse_qs(address.query)["token"][0])


def test_the_lab_answers_only_with_the_token(lab: Lab) -> None:
    assert lab.get("/api/status", token=False)[0] == 403
    assert lab.get("/api/contents", token=False)[0] == 403
    assert lab.get("/api/status")[0] == 200
    status, page = lab.get("/lab")
    assert status == 200 and "<title>JupyterLab</title>" in page


def test_the_lab_opens_the_repository_with_its_settings(lab: Lab) -> None:
    listing = json.loads(lab.get("/api/contents")[1])
    assert "pyproject.toml" in [entry["path"] for entry in listing["content"]]
    page = lab.get("/lab")[1]
    config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert config["extensionManager"]["name"] == "read-only"
    assert config["news"] == {"disabled": True}
    settings = lab.get("/lab/api/settings/@jupyterlab/apputils-extension:kernels-settings")[1]
    comms = json.loads(settings)["schema"]["properties"]["commsOverSubshells"]
    assert comms["default"] == "disabled"


def test_a_kernel_is_this_python_with_one_thread_and_no_noise(lab: Lab) -> None:
    _, answer = lab.get("/api/kernels", method="POST", data=b"{}")
    address, token = urlsplit(lab.url).netloc, urlsplit(lab.url).query
    channels = f"ws://{address}/api/kernels/{json.loads(answer)['id']}/channels?{token}&session_id=1"
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS'], sys.executable)"
    header = {"msg_id": "1", "msg_type": "execute_request", "session": "1", "version": "5.3"}
    request = {"header": header, "channel": "shell", "content": {"code": code}}
    request |= {"parent_header": {}, "metadata": {}}
    socket = websocket.create_connection(channels, timeout=30)
    socket.send(json.dumps(request))
    while (message := json.loads(socket.recv()))["header"]["msg_type"] != "stream":
        assert message["header"]["msg_type"] != "error", message
    socket.close()
    assert message["content"]["text"] == f"1 {sys.executable}\n"
    assert "WARNING" not in lab.log.read_text()


@pytest.mark.parametrize("answers", [True, False])
def test_a_socket_is_closed_only_when_the_page_is_silent(answers: bool, monkeypatch) -> None:
    """Ten minutes of the lab's own pings, on a clock of the test's."""
    from jupyter_server.base import websocket as jupyter
    from traitlets.config.loader import PyFileConfigLoader

    config = PyFileConfigLoader(
        "jupyter_server_config.py", str(ROOT / "environment" / "jupyter")
    ).load_config()
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now)
    monkeypatch.setattr(jupyter.ioloop, "IOLoop", SimpleNamespace(current=lambda: clock))
    closed = []

    class Socket(jupyter.WebSocketMixin):
        settings = config.ServerApp.get("tornado_settings", {})
        log = logging.getLogger("a test's lab")
        ws_connection = SimpleNamespace(client_terminated=False)

        def ping(self, data: bytes) -> None:
            if answers:
                self.on_pong(data)

        def close(self) -> None:
            closed.append(clock.now)

    socket = Socket()
    assert socket.ping_interval > 0
    socket.last_ping = socket.last_pong = clock.now
    while clock.now < 600 and not closed:
        clock.now += socket.ping_interval / 1e3 + 0.001
        socket.send_ping()
    assert bool(closed) != answers, f"closed after {closed} s"
