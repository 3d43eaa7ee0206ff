"""Use a built image as a person would, from outside, and say what does not hold: `make image-test`.

Needs the standard library and docker or podman. What it starts is named memlib-check-… and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from engine import START, WORK, Image

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("--user", "4321", "--group-add", "users")
# What the image takes on disk, per build of torch: a tenth more than when it was last measured.
GIGABYTES = {"cpu": 2.7, "cuda": 6.6}
SECONDS_TO_STOP = 8

CHECKS: list[Callable[[Image], None]] = []


def check(function: Callable[[Image], None]) -> Callable[[Image], None]:
    CHECKS.append(function)
    return function


@check
def is_an_ordinary_user_with_a_health_check(image: Image) -> None:
    about = image.inspect()
    config = about["Config"]
    assert config["User"] == "1000", config["User"]
    assert list(config["ExposedPorts"]) == ["8888/tcp"] and config["Cmd"] == ["lab"]
    health = config.get("Healthcheck") or about.get("Healthcheck")
    assert health, "no health check: podman keeps it only with BUILDAH_FORMAT=docker"
    said = image.once("bash", "-c", "id -un; id -gn; grep CapEff /proc/self/status; cat /proc/1/comm")
    assert said.split() == ["jovyan", "users", "CapEff:", "0" * 16, "tini"], said


@check
def is_no_larger_than_it_was(image: Image) -> None:
    gigabytes = image.inspect()["Size"] / 1e9
    limit = GIGABYTES[image.torch]
    assert gigabytes <= limit, f"{gigabytes:.2f} GB, limit {limit}: see the layers, or raise GIGABYTES here"


@check
def holds_nothing_of_the_machine_that_built_it(image: Image) -> None:
    names = [entry.partition("=")[0] for entry in image.inspect()["Config"]["Env"]]
    assert not [name for name in names if re.match(r"PIP_|.*(TOKEN|PROXY)", name, re.I)], names
    history = image.call("history", "--no-trunc", image.name)
    assert not re.search(r"PIP_\w+=\S*/|index-url|proxy", history, re.I), history
    ours = "/opt/memlib/{.git,.venv,runs,local.mk,.engine,environment/wheelhouse}"
    search = f"ls -d /build /etc/pip.conf /root/.cache {ours}; find / -xdev -name '*.whl'; true"
    found = [path for path in image.once("bash", "-c", search).split() if "/ensurepip/" not in path]
    assert not found, found


@check
def has_the_locked_packages_and_this_project(image: Image) -> None:
    assert "all as locked" in image.once("doctor")
    program = "import memlib, torch; print(memlib.__file__, 'cuda' if torch.version.cuda else 'cpu')"
    assert image.once("python", "-c", program).split() == ["/opt/memlib/memlib/__init__.py", image.torch]


@check
def prints_one_address_with_a_token_of_its_own(image: Image) -> None:
    with image.lab() as first, image.lab() as second:
        assert first.token != second.token
        assert "WARNING" not in first.log, first.log


@check
def answers_only_with_the_token(image: Image) -> None:
    with image.lab() as lab:
        assert lab.get("api/contents", token="")[0] == 403
        assert lab.get("api/contents", token="0" * 48)[0] == 403
        assert lab.get("api/contents")[0] == 200


@check
def shows_the_page_and_settings_of_make_lab(image: Image) -> None:
    with image.lab() as lab:
        status, page = lab.get(f"lab/tree/{START}")
        assert status == 200 and b"<title>JupyterLab</title>" in page and b'"read-only"' in page
        shipped = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
        assert {entry["name"] for entry in lab.read("notebooks")} >= shipped
        assert lab.first_cell() == "".join(json.loads((ROOT / START).read_text())["cells"][0]["source"])


@check
def becomes_healthy(image: Image) -> None:
    with image.lab() as lab:
        if image.is_podman:
            image.call("healthcheck", "run", lab.name)
            return
        deadline = time.monotonic() + 60
        while (
            state := image.call("inspect", "--format", "{{.State.Health.Status}}", lab.name).strip()
        ) != "healthy":
            assert state == "starting" and time.monotonic() < deadline, state
            time.sleep(0.5)


@check
def stops_on_sigterm_with_its_kernels(image: Image) -> None:
    with image.lab() as lab:
        assert lab.get("api/kernels", method="POST", body={"name": "python3"})[0] == 201
        start = time.monotonic()
        image.call("stop", "--time", "30", lab.name)
        seconds = time.monotonic() - start
        status = image.call("inspect", "--format", "{{.State.ExitCode}}", lab.name).strip()
        assert status == "0" and seconds < SECONDS_TO_STOP, f"exit status {status} after {seconds:.1f} s"


@check
def keeps_edits_from_one_container_to_the_next(image: Image) -> None:
    with image.volume() as volume:
        with image.lab(volume) as lab:
            assert lab.edit("# mine") == 200
        with image.lab(volume) as lab:
            assert lab.first_cell() == "# mine"


@check
def works_as_another_user(image: Image) -> None:
    with image.volume() as volume, image.lab(volume, *FOREIGN) as lab:
        assert lab.edit("# theirs") == 200
        assert lab.exec("stat", "-c", "%u", f"{WORK}/{START}").strip() == "4321"
        assert "cannot be written" not in lab.log
        lab.exec("python", "-c", "import matplotlib.pyplot, torch, getpass; getpass.getuser()")


@check
def survives_a_folder_that_it_cannot_write(image: Image) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        user = "4321" if os.getuid() != 4321 else "4322"
        with image.lab("--volume", f"{folder}:{WORK}", "--user", user) as lab:
            assert f"{WORK} cannot be written by user {user}" in lab.log and "--user" in lab.log, lab.log
            assert lab.edit("# lost") == 200
        assert not list(Path(folder).iterdir())


@check
def works_on_a_read_only_root(image: Image) -> None:
    with image.volume() as volume, image.lab("--read-only", "--tmpfs=/tmp", volume) as lab:
        assert lab.edit("# kept") == 200
        assert lab.get("api/kernels", method="POST", body={"name": "python3"})[0] == 201
        assert "cannot be written" not in lab.log
        assert lab.exec("cat", f"{WORK}/{START}").count("# kept") == 1


@check
def says_what_a_read_only_root_lacks(image: Image) -> None:
    if not image.is_podman:  # which gives a read-only root its /tmp by itself
        command = ("run", "--rm", "--network=none", "--read-only", image.name, "doctor")
        assert "Add: --tmpfs /tmp" in image.call(*command, fails=True, both=True)


@check
def runs_a_notebook_and_its_tests_without_a_network(image: Image) -> None:
    said = image.once("test", "PYTEST_ARGS=-q -k 00_start_here")
    assert re.search(r"\d+ passed", said) and not re.search(r"\d (failed|error)", said), said


@check
def runs_a_notebook_without_a_network_as_another_user_on_a_read_only_root(image: Image) -> None:
    options = (*FOREIGN, "--read-only", "--tmpfs=/tmp")
    with image.volume() as volume:
        image.once("python", "-m", "memlib.lab.notebooks", "run", START, options=(volume, *options))
        notebook = json.loads(image.once("cat", START, options=(volume,)))
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    verdicts = "".join("".join(output.get("text", [])) for output in outputs)
    assert ". yes\n" in verdicts and " NO\n" not in verdicts, verdicts


@check
def opens_a_shell_and_runs_any_command(image: Image) -> None:
    assert image.once("shell", "-c", "pwd; ls notebooks").split()[:2] == [WORK, "00_start_here.ipynb"]
    assert "segment_length" in image.once("memlib", "config", "show", "recall_internal")
    missing = ("run", "--rm", "--network=none", image.name, "no-such-command")
    assert "no-such-command" in image.call(*missing, fails=True, both=True)


@check
def starts_as_binder_starts_it(image: Image) -> None:
    command = ("jupyter-lab", "--ip=0.0.0.0", "--NotebookApp.base_url=/user/x/", "--NotebookApp.token=secret")
    with image.lab(command=command, base="/user/x/") as lab:
        assert lab.get("api/contents", token="")[0] == 403
        assert lab.get(f"api/contents/{START}", token="secret")[0] == 200


def layers(image: Image) -> Iterator[str]:
    """A line for each layer of more than a megabyte."""
    listing = image.call("history", "--format", "{{.Size}}\t{{.CreatedBy}}", image.name)
    for size, _, command in (line.partition("\t") for line in listing.splitlines()):
        if re.search(r"[MG]B", size):
            yield f"  {size:>8}  {' '.join(command.split())[:70]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("image")
    parser.add_argument("--engine", default="docker", help="docker or podman")
    parser.add_argument("--torch", choices=GIGABYTES, default="cpu", help="the build of torch that it has")
    parser.add_argument("--host-network", action="store_true", help="where the engine cannot publish ports")
    parser.add_argument("-k", default="", metavar="WORD", help="only the checks whose name has this word")
    options = parser.parse_args()
    image = Image(options.engine, options.image, options.torch, options.host_network)

    about, failed = image.inspect(), []
    print(f"{date.today()}  {image.call('--version').strip()}")
    print(f"{image.name}, torch for {image.torch}: {about['Size'] / 1e9:.2f} GB")
    print("\n".join(layers(image)))
    for function in CHECKS:
        name = function.__name__.replace("_", " ")
        if options.k not in name:
            continue
        start = time.monotonic()
        try:
            function(image)
        except Exception as error:  # whatever goes wrong, the other checks are still worth running
            failed.append(name)
            print(f"FAILED   {name}\n{type(error).__name__}: {error}")
        else:
            print(f"{time.monotonic() - start:5.1f} s  {name}", flush=True)
    print(f"{len(failed)} failed" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
