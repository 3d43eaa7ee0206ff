"""What the hybrid's measurement says of models whose parts are known; and the stored results."""

import json
from pathlib import Path

import pytest
import torch

from memlib.config import load_config, override
from memlib.evaluation.hybrid import hybrid_table, left_out, measure, measure_hybrid
from memlib.models import MemoryTransformer
from memlib.tasks import make_task

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def hybrid():
    torch.manual_seed(0)
    config = load_config("mixed_hybrid")
    model = MemoryTransformer(config)
    with torch.no_grad():
        model.block(0).memories["external"].retrieval.query.weight.normal_()
    return model, make_task(config.task, config.model.segment_length)


def test_rows_and_their_searches(hybrid):
    model, task = hybrid
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = {row.name: row for row in measure_hybrid(model, task, "fact", 8)}
    assert list(rows) == [
        "learned",
        "without internal",
        "without external",
        "always",
        "oracle",
        "random",
        "never",
    ]
    assert rows["always"].searched == 1 and rows["never"].searched == 0
    tokens, fact = task.batch(8, 0, split="test").tokens, task.vocabulary["fact"]
    share = ((tokens >= fact.start) & (tokens < fact.stop)).double().mean()
    assert rows["oracle"].searched == pytest.approx(float(share))
    assert 0 < rows["learned"].searched < 1
    assert rows["random"].searched == pytest.approx(rows["learned"].searched, abs=0.05)
    assert set(rows["learned"].accuracy) == {"fact", "register"}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "asks" not in vars(model.block(0).memories["external"])
    head, lines = hybrid_table(list(rows.values()))
    assert head[1:3] == ["fact recalled", "register recalled"] and lines[3][-1] == "1.00"


def test_accuracy_by_family_is_counted_by_hand(hybrid):
    model, task = hybrid
    row = measure(model, task, "learned", 8)
    batch = task.batch(8, 0, split="test")
    hit = model(batch.tokens).logits.argmax(-1) == batch.targets
    for family in ("fact", "register"):
        ids = task.vocabulary[family]
        where = batch.scored & torch.isin(batch.tokens, torch.tensor(ids))
        assert row.accuracy[family] == pytest.approx(float(hit[where].double().mean()))


@torch.no_grad()
def test_a_source_left_out_has_no_weight_and_the_others_keep_their_ratio(hybrid):
    model, _ = hybrid
    fusion = model.block(0).fusion
    fusion.gate.weight.normal_()
    hidden, eye = torch.randn(1, 5, 64), torch.eye(64)[:3]
    parts = [row.expand(1, 5, 64) for row in eye]
    whole = fusion(hidden, parts[0], parts[1:])[..., :3]
    with left_out(model, 2):
        rest = fusion(hidden, parts[0], parts[1:])[..., :3]
    assert not rest[..., 2].any()
    torch.testing.assert_close(rest[..., :2], whole[..., :2] / whole[..., :2].sum(-1, keepdim=True))


def test_a_model_without_a_retrieval_gate_is_refused():
    config = override(load_config("mixed_hybrid"), {"memory.external.retrieval_gate": "none"})
    task = make_task(config.task, config.model.segment_length)
    with pytest.raises(ValueError, match=r"no retrieval gate: set memory\.kinds"):
        measure_hybrid(MemoryTransformer(config), task, "fact")


def test_the_stored_hybrids_need_both_parts_and_search_where_the_oracle_does():
    stored = json.loads((RESULTS / "hybrid.json").read_text(encoding="utf-8"))
    assert len(stored) >= 3
    for rows in stored.values():
        row = {r["name"]: r for r in rows}
        whole = row["learned"]["accuracy"]
        assert whole["fact"] >= 0.99 and whole["register"] >= 0.95
        assert row["without external"]["accuracy"]["fact"] <= 0.15
        assert row["without internal"]["accuracy"]["register"] <= 0.45
        for name in ("always", "oracle"):
            assert all(abs(row[name]["accuracy"][f] - whole[f]) <= 0.02 for f in whole)
        assert row["learned"]["searched"] <= row["oracle"]["searched"] + 0.05
        assert row["random"]["accuracy"]["fact"] <= 0.2


def test_the_hybrid_beats_each_of_its_parts():
    from memlib.experiments.comparison import read_json

    results = read_json(RESULTS / "mixed.json")

    def scores(name, segments):
        return [r.accuracy[segments] for r in results if r.name == f"mixed_{name}"]

    for segments in (4, 16):
        assert len(scores("hybrid", segments)) >= 3
        assert min(scores("hybrid", segments)) >= 0.98
        assert max(scores("internal", segments) + scores("external", segments)) <= 0.8
        assert max(scores("baseline", segments)) <= 0.1
