"""Because a block's forward is the only door to its parameters, FSDP2 shards every architecture as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memlib.memory import MEMORIES
from tests.laws.cases import cases

ROOT = Path(__file__).parents[2]


def chosen():
    """The baseline; each memory, some with a shared state, one in each residual variant; all together.

    Chapters share learned tokens between layers, which FSDP wants in a group of their own: only per layer.
    """
    names = [case.name for case in cases()]
    first = {
        kind: next(n for n in names if n.startswith(kind) and n.endswith("per_layer")) for kind in MEMORIES
    }
    shared = [
        next(n for n in names if n.startswith(kind) and n.endswith("-shared")) for kind in ("internal", "hds")
    ]
    residual = [n for n in names if n.startswith("ltm") and n.endswith(("residual_A", "residual_B"))][:2]
    inside = next(n for n in names if n.startswith("external-joint") and n.endswith("per_layer"))
    return ["baseline", *first.values(), *shared, *residual, inside]


@pytest.mark.slow
def test_two_processes_with_sharded_blocks_train_like_one(tmp_path):
    command = [sys.executable, "-m", "tests.models.sharded", str(tmp_path), *chosen()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    gaps = json.loads((tmp_path / "gaps.json").read_text(encoding="utf-8"))
    assert len(gaps) == 2 * len(chosen())
    assert {name: gap for name, gap in gaps.items() if gap > 1e-10} == {}, gaps
