"""The package stands alone: it imports without memlib, and without Triton; its operations are documented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import memlib_kernels

KERNELS = Path(__file__).parents[2] / "kernels"
BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from memlib_kernels import flash_attention, gated_write, memory_attention
q = torch.randn(1, 2, 5, 16)
out, lse = flash_attention(q, q, q, causal=True)
assert out.shape == q.shape and memory_attention(q, q, q).shape == q.shape
assert not {blocked!r} & {{name.partition(".")[0] for name in sys.modules if sys.modules[name] is not None}}
"""


@pytest.mark.parametrize("blocked", [{"memlib"}, {"triton"}], ids=str)
def test_it_imports_and_runs_without(blocked):
    run = [sys.executable, "-c", BLOCKED.format(blocked=blocked)]
    done = subprocess.run(run, env={"PYTHONPATH": str(KERNELS)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_importing_it_does_not_load_triton():
    code = "import memlib_kernels, sys; print([n for n in sys.modules if n.startswith('triton.language')])"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={"PYTHONPATH": str(KERNELS)}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", memlib_kernels.__all__)
def test_every_operation_says_what_it_computes(name):
    assert getattr(memlib_kernels, name).__doc__
