"""Write the lock files from pyproject.toml, or check that they satisfy it.

Without an option it keeps every pin that is still in range. README.md says what each file is for.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYPROJECT = HERE.parent / "pyproject.toml"
FILES = BASE, CPU, CUDA, BROWSER, EXTRAS, EVALUATION = (
    "base.txt",
    "torch-cpu.txt",
    "torch-cuda.txt",
    "browser.txt",
    "extras.txt",
    "evaluation.txt",
)
# lm-eval needs these three, and their authors publish no wheels. pip builds them with the setuptools of
# base.txt: each is one folder of Python.
SOURCES = ("rouge-score", "sqlitedict", "word2number")
HEAD = "# Written by environment/lock.py from pyproject.toml: change that, then `make lock`.\n"

PLATFORMS = (
    "x86_64-manylinux_2_28",
    "aarch64-manylinux_2_28",
    "aarch64-apple-darwin",
    "x86_64-pc-windows-msvc",
)

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# PyPI has no CPU builds for Linux, so no resolution can know them: here are the published sha256 of
# torch-2.13.0+cpu-*-manylinux_2_28_{x86_64,aarch64}.whl. Only cp311 on x86_64 has been installed.
CPU_WHEELS = {
    "2.13.0": {
        "cp311": [
            "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
            "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
        ],
        "cp312": [
            "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
            "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
        ],
        "cp313": [
            "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
            "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
        ],
    }
}
PIN = re.compile(r"^([\w.-]+)==([^\s;]+)[^\\\n]*(?: \\\n    --hash=sha256:[0-9a-f]{64})+$", re.M)
TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def resolve(extras: list[str], preferred: str) -> dict[str, str]:
    """uv's resolution for all Pythons and platforms: name to lock entry, near `preferred`."""
    entries: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "lock.txt")
        output.write_text(preferred)
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal"]
        command += [f"--python-version={pythons()[0]}", "--generate-hashes", "--no-header", "--no-annotate"]
        command += [f"--extra={extra}" for extra in extras]
        command += [f"--output-file={output}", str(PYPROJECT)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for entry in re.split(r"\n(?=\S)", output.read_text().strip()):
            # uv also resolves for later Pythons, with a fork where their answer differs, and for Pyodide.
            since = re.match(r".*python_full_version >= '3\.(\d+)", entry)
            if (since and f"3.{since[1]}" not in pythons()) or "and sys_platform == 'emscripten'" in entry:
                continue
            name = entry.partition("==")[0]
            entries[name] = entries.get(name, "") + entry + "\n"
    return entries


def write(upgrade: bool) -> None:
    """Resolve with and without what only some need, cut by name, write the files."""
    kept = "".join(map(read, (BASE, CUDA, BROWSER, EXTRAS, EVALUATION)))
    full = resolve(["dev", "browser", "pretrained", "evaluation"], "" if upgrade else kept)
    lean, browser, pretrained = (
        resolve(["dev", *more], "".join(full.values()))
        for more in ([], ["browser"], ["browser", "pretrained"])
    )
    version = PIN.match(full["torch"])[2]
    if version not in CPU_WHEELS:
        sys.exit(
            f"torch {version} has no CPU build recorded: add the sha256 of its Linux wheels for Python "
            f"{', '.join(pythons())}, listed at {CPU_INDEX}/torch/, to CPU_WHEELS in environment/lock.py"
        )
    digests = [digest for wheels in CPU_WHEELS[version].values() for digest in wheels]
    digests = "".join(f" \\\n    --hash=sha256:{digest}" for digest in digests)
    on_linux = f"torch=={version}+cpu ; sys_platform == 'linux'{digests}\n"
    elsewhere = full["torch"].replace(" \\", " ; sys_platform != 'linux' \\", 1)
    rest = [name for name in full if not TORCH.match(name)]
    for file, entries in {
        BASE: [full[name] for name in rest if name in lean],
        CPU: [f"--extra-index-url {CPU_INDEX}\n", on_linux, elsewhere, full["triton"]],
        CUDA: [full[name] for name in full if TORCH.match(name)],
        BROWSER: [full[name] for name in rest if name in browser and name not in lean],
        EXTRAS: [full[name] for name in rest if name in pretrained and name not in browser],
        EVALUATION: [full[name] for name in rest if name not in pretrained],
    }.items():
        (HERE / file).write_text(HEAD + "".join(entries))


def install_on_paper() -> list[str]:
    """What the locks lack for a supported Python and platform, a line each; uv downloads metadata only.

    The CPU builds of torch are not on PyPI, so the CUDA builds stand for them.
    """
    wrong, environ = [], os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    for python, platform in itertools.product(pythons(), PLATFORMS):
        command = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--target=.venv"]
        command += [f"--python-version={python}", f"--python-platform={platform}"]
        command += ["--only-binary=:all:", "--no-deps", "--require-hashes"]
        command += [f"--no-binary={name}" for name in SOURCES]
        command += [f"--requirement={HERE / file}" for file in (BASE, CUDA, BROWSER, EXTRAS, EVALUATION)]
        tried = subprocess.run(command, env=environ, capture_output=True, text=True)
        if tried.returncode:
            wrong.append(f"Python {python} on {platform}: {tried.stderr.strip()}")
    return wrong


def check() -> list[str]:
    """What keeps the lock files from satisfying pyproject.toml, a line each."""
    wrong, pins = [], {}
    for file in FILES:
        pins[file] = dict(PIN.findall(read(file)))
        for line in PIN.sub("", read(file)).splitlines():
            if line and line[0] != "#" and (file, line) != (CPU, f"--extra-index-url {CPU_INDEX}"):
                wrong.append(f"{file}: neither a pin nor its hash: {line.strip()}")
    table = tomllib.loads(PYPROJECT.read_text())
    recorded = CPU_WHEELS.get(pins[CUDA].get("torch"), {})
    for python in pythons():
        digests = recorded.get(f"cp{python.replace('.', '')}", ["not recorded"])
        if not all(digest in read(CPU) for digest in digests):
            wrong.append(f"{CPU}: no hash of torch's CPU build for Python {python}")
    optional = table["project"]["optional-dependencies"]
    base = table["build-system"]["requires"] + table["project"]["dependencies"] + optional["dev"]
    needs = [(need, files) for need in base for files in ((BASE, CPU), (BASE, CUDA))]
    needs += [(need, (BASE, BROWSER)) for need in optional["browser"]]
    needs += [(need, (BASE, BROWSER, EXTRAS)) for need in optional["pretrained"]]
    needs += [(need, (BASE, BROWSER, EXTRAS, EVALUATION)) for need in optional["evaluation"]]
    for need, files in needs:
        name, specifier = re.match(r"([\w.-]+)(?:\[.*?\])?\s*([^;]*)", need).groups()
        version = next((pins[f][name.lower()] for f in files if name.lower() in pins[f]), None)
        if version is None:
            wrong.append(f"{' and '.join(files)}: no pin for {name}")
        elif not in_range(version, specifier):
            wrong.append(f"{' and '.join(files)}: {name}=={version} is not {specifier.strip()}")
    return wrong


def pythons() -> list[str]:
    """The Pythons of `requires-python`, oldest first: ["3.11", …]."""
    requires = tomllib.loads(PYPROJECT.read_text())["project"]["requires-python"]
    first, end = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", requires).groups())
    return [f"3.{minor}" for minor in range(first, end)]


def in_range(version: str, specifier: str) -> bool:
    """Whether a version meets '>=2.13,<2.14'; a local part ('+cpu') counts for nothing."""
    for order, bound in re.findall(r"(>=|<=|==|<|>)\s*([\d.]+)", specifier):
        a, b = ([int(n) for n in v.partition("+")[0].split(".")] for v in (version, bound))
        a, b = a + [0] * (len(b) - len(a)), b + [0] * (len(a) - len(b))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[order]:
            return False
    return True


def read(file: str) -> str:
    return (HERE / file).read_text() if (HERE / file).exists() else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with pyproject.toml only")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions in range")
    options = parser.parse_args()
    if not options.check:
        write(options.upgrade)
        if lacking := install_on_paper():
            sys.exit("\n".join(lacking))
    if problems := check():
        sys.exit("\n".join([*problems, "`make lock` writes the lock files anew"]))
    print("lock: the files in environment/ satisfy pyproject.toml")
