"""The package as a whole: quick to import, and every public name is there."""

import subprocess
import sys

import pytest

import memlib

IMPORT = """
import sys, time
start = time.perf_counter()
import memlib
print(time.perf_counter() - start, "torch" in sys.modules)
"""


def test_import_is_quick_and_loads_no_torch():
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert {run.split()[1] for run in runs} == {"False"}
    assert min(float(run.split()[0]) for run in runs) < 0.5


@pytest.mark.parametrize("name", memlib.__all__)
def test_every_public_name_is_importable(name):
    assert getattr(memlib, name) is not None
    assert name in dir(memlib)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"memlib.*no attribute 'Lstm'"):
        _ = memlib.Lstm
