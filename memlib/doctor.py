"""Report what this machine and this environment support: `make doctor`.

This file imports only the standard library, and it reports a missing or broken package as a line of the
report: it must work in a broken environment.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PIN = re.compile(r"^([\w.-]+)==([^\s;]+)(?: ; (.+?))? \\$", re.MULTILINE)
GIB = 2**30

Row = dict[str, Any]


def report(root: Path = ROOT) -> dict[str, Row]:
    """The findings by subject: each row has a `value` and its meaning in words, `means`.

    root: the repository, with lock files in `root/environment`. The row "Packages" also has `problems`: one
    line for each difference between the environment and the lock.
    """
    torch = load("torch")
    return {
        "Python": python(root),
        "CPU": cpu(),
        "Memory": memory(),
        "torch": torch_build(torch),
        "Threads": threads(torch),
        "GPU": gpu(torch),
        "Triton": triton(torch),
        "FAISS": faiss(),
        "Pretrained": pretrained(),
        "Browser": browser(),
        "Packages": packages(root, torch),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the report; returns 1 if the environment differs from the lock, else 0."""
    parser = argparse.ArgumentParser(prog="memlib doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(argv)
    rows = report()
    problems = rows["Packages"]["problems"]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 1 if problems else 0

    width = max(len(row["value"]) for row in rows.values())
    for subject, row in rows.items():
        print(f"{subject:<12}{row['value']:<{width + 2}}{row['means']}".rstrip())
    for problem in problems[:10]:
        print(f"{'':<12}{problem}")
    if len(problems) > 10:
        print(f"{'':<12}and {len(problems) - 10} more")
    return 1 if problems else 0


def load(name: str) -> Any:
    """Import a module; returns it, or the exception that the import raised."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken binary raises OSError, RuntimeError and others
        return error


def broken(name: str, error: Exception, means: str) -> Row:
    """The row of a package that cannot be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return {"value": "not installed", "means": means}
    return {"value": "does not import", "means": f"{type(error).__name__}: {error}".split("\n")[0]}


def python(root: Path) -> Row:
    minors = supported(root)
    if not minors:
        return {"value": platform.python_version(), "means": sys.executable}
    fits = "one of" if sys.version_info[0] == 3 and sys.version_info[1] in minors else "not of"
    means = f"{fits} the lock's 3.{minors[0]} to 3.{minors[-1]}; {sys.executable}"
    return {"value": platform.python_version(), "means": means}


def supported(root: Path) -> range:
    """The minor versions of Python 3 that `requires-python` allows; empty without a pyproject.toml."""
    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    bounds = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', text, re.MULTILINE)
    return range(int(bounds[1]), int(bounds[2])) if bounds else range(0)


def cpu() -> Row:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {"value": f"{cores} cores", "means": model[1] if model else platform.processor()}


def memory() -> Row:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container may use less memory than the machine has.
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    enough = total >= 3.5 * GIB
    means = "enough for every notebook" if enough else "little: run one notebook at a time"
    return {"value": f"{total / GIB:.1f} GiB", "means": means}


def torch_build(torch: Any) -> Row:
    if isinstance(torch, Exception):
        return broken("torch", torch, "nothing runs without it: make env")
    if torch.version.cuda:
        return {"value": torch.__version__, "means": f"CUDA {torch.version.cuda} build"}
    return {"value": torch.__version__, "means": "CPU build: every notebook and test runs on it"}


def threads(torch: Any) -> Row:
    asked = os.environ.get("OMP_NUM_THREADS")
    value = asked or "default"
    if not isinstance(torch, Exception):
        value = f"{torch.get_num_threads()} for torch"
    if asked:
        return {"value": value, "means": f"OMP_NUM_THREADS={asked}"}
    return {"value": value, "means": "on busy cores 1 can be faster: OMP_NUM_THREADS=1"}


def gpu(torch: Any) -> Row:
    if isinstance(torch, Exception) or not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            means = "an NVIDIA driver is here, but this torch sees no device: make env TORCH=cuda"
        else:
            means = "not needed: models run on the CPU, kernels in Triton's interpreter"
        return {"value": "none", "means": means}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{d.name} ({d.total_memory / GIB:.0f} GiB)" for d in devices)
    return {"value": f"{len(devices)}", "means": f"{names}: kernels run compiled"}


def triton(torch: Any) -> Row:
    module = load("triton")
    if isinstance(module, Exception):
        return broken("triton", module, "Linux only; elsewhere each kernel's CPU path runs")
    interpreter = load("triton.runtime.interpreter")
    if isinstance(interpreter, Exception):
        row = broken("triton.runtime.interpreter", interpreter, "its interpreter is missing")
        return {"value": module.__version__, "means": row["means"]}
    on_gpu = not isinstance(torch, Exception) and torch.cuda.is_available()
    means = "kernels run in its interpreter and compile ahead of time for GPUs"
    return {"value": module.__version__, "means": "kernels run on the GPU" if on_gpu else means}


def faiss() -> Row:
    module = load("faiss")
    if isinstance(module, Exception):
        return broken("faiss", module, "external memory has no index without it: make env")
    return {"value": module.__version__, "means": "external memory retrieves through its indexes"}


def pretrained() -> Row:
    """Look up the version only: importing transformers takes seconds."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return {"value": "not installed", "means": "for Qwen, Llama and Mistral: make extras"}
    return {"value": f"transformers {version}", "means": "Qwen, Llama and Mistral take memories"}


def browser() -> Row:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        return {"value": "none", "means": "the browser tests need one: apt install chromium"}
    return {"value": Path(path).name, "means": f"the browser tests run in {path}"}


def packages(root: Path, torch: Any) -> Row:
    """Compare the installed versions with base.txt and the lock of this torch build.

    Packages of extras.txt may be missing, but must not differ.
    """
    folder, minors = root / "environment", supported(root)
    if not (folder / "base.txt").exists():
        means = "no lock files found, so versions are not compared"
        return {"value": f"{len(list(metadata.distributions()))}", "means": means, "problems": []}
    build = "cuda" if getattr(getattr(torch, "version", None), "cuda", None) else "cpu"
    locked = pins(folder / "base.txt") | pins(folder / f"torch-{build}.txt")
    extras = pins(folder / "extras.txt")
    problems = []
    if minors and sys.version_info[1] not in minors:
        problems.append(f"Python {platform.python_version()}, locked 3.{minors[0]} to 3.{minors[-1]}")
    for name, version in (extras | locked).items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in locked:
                problems.append(f"{name} missing, locked {version}")
            continue
        if installed != version:
            problems.append(f"{name} {installed}, locked {version}")
    means = "not as locked: make env" if problems else "all as locked"
    return {"value": f"{len(locked)} locked", "means": means, "problems": problems}


def pins(lock: Path) -> dict[str, str]:
    """{name: version} of the lock's pins whose markers hold on this machine."""
    found = PIN.findall(lock.read_text()) if lock.exists() else []
    markers = load("packaging.markers")
    if isinstance(markers, Exception):
        # packaging is in the lock itself, so its absence is reported in any case.
        return {name: version for name, version, marker in found if not marker}
    return {n: version for n, version, m in found if not m or markers.Marker(m).evaluate()}


if __name__ == "__main__":
    sys.exit(main())
