from __future__ import annotations

import pytest

from memlib.config import Config, override
from memlib.evaluation.retrieval import INDEXES, index_table, measure_index, measure_task, task_table
from memlib.memory.external.backends import StateBackend
from memlib.models import MemoryTransformer
from memlib.models.stores import external_memories
from memlib.tasks import make_task


@pytest.mark.parametrize("name", [name for name in INDEXES if name != "ivfpq"])
def test_exact_searches_find_all_and_latency_comes_with_recall(name):
    result = measure_index(name, 1500, dim=16, queries=8, top_k=10, repeats=3)
    assert result.milliseconds > 0 and 0.2 < result.recall <= 1
    assert (result.overhead is None) == (name == "torch")
    if name in ("torch", "flat"):
        assert result.recall == 1
    _, (row,) = index_table([result])
    assert row[:2] == ["1,500", name] and row[3] == f"{result.recall:.3f}"


def test_a_model_is_measured_with_its_state_and_with_stores():
    config = override(
        Config(),
        {"model.hidden_dim": 16, "model.num_heads": 2, "model.num_layers": 1, "model.vocab_size": 64}
        | {"model.segment_length": 16, "memory.kinds": ["external"], "task.name": "passkey"}
        | {"memory.external.num_heads": 2, "memory.external.capacity": 64, "memory.external.top_k": 4},
    )
    model = MemoryTransformer(config)
    results = measure_task(model, make_task(config.task, 16), ["torch", "hnsw"], examples=16)
    assert [r.index for r in results] == ["state", "torch", "hnsw"]
    assert len({r.accuracy for r in results}) == 1  # 64 rows are fewer than a block: all exact
    assert all(
        isinstance(m.backend, StateBackend) for group in external_memories(model).values() for m in group
    )
    assert [row[0] for row in task_table(results)[1]] == ["state", "torch", "hnsw"]
