"""FSDP2 shards an adapter's branches, its base's layers and its base as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_with_a_sharded_adapter_train_like_one(tmp_path, peer):
    peer("transformers")
    command = [sys.executable, "-m", "tests.pretrained.sharded", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    gaps = json.loads((tmp_path / "gaps.json").read_text(encoding="utf-8"))
    assert len(gaps) == 8
    assert {name: gap for name, gap in gaps.items() if gap > 1e-10} == {}, gaps
