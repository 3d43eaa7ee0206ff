"""Precision by block: the budget is kept, the extremes are the extremes, and a choice can be applied."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from memlib.evaluation.precision import LEVELS, Precision, choose, lower, predictions, to_table
from tests.laws.cases import VOCAB, cases, in_float32

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "docs/results/precision.json").read_text(encoding="utf-8"))
CASES = [in_float32(case) for case in cases() if case.name in ("baseline", "all-per_layer")]


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (3, 10), generator=generator) for _ in range(2)]


def error_of(model, levels):
    """KL by torch, token by token."""
    before, after = (predictions(m, batches()) for m in (model, lower(deepcopy(model), levels)))
    return float(torch.nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_budget_is_kept_and_bytes_fall_with_it(case):
    model, before = case.build(), deepcopy(case.build().state_dict())
    worst = error_of(model, ["int8"] * len(model.blocks))
    found = [choose(model, batches(), budget) for budget in (0.0, worst / 3, 1e9)]
    assert found[0].levels == ["full"] * len(model.blocks) and found[0].error == 0
    assert "full" not in found[-1].levels
    for result in found:
        assert result.error <= result.budget
        assert error_of(model, result.levels) == pytest.approx(result.error, abs=1e-12)
    assert found[0].nbytes > found[1].nbytes >= found[2].nbytes
    assert choose(model, batches(), worst / 3) == found[1]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_any_budget_ends_in_the_fewest_bytes():
    model = CASES[0].build()
    result = choose(model, batches(), float("inf"))
    assert result.levels == ["int8"] * len(model.blocks)


def test_the_error_is_of_the_blocks_together():
    """Each block alone would fit this budget; all of them do not."""
    model = CASES[0].build()
    worst = error_of(model, ["int8"] * len(model.blocks))
    alone = max(error_of(model, ["int8" if i == k else "full" for i in range(3)]) for k in range(3))
    assert alone < worst
    result = choose(model, batches(), (alone + worst) / 2)
    assert result.error <= (alone + worst) / 2 and result.levels != ["int8"] * 3


@torch.no_grad()
def test_a_lowered_model_reads_token_by_token_like_at_once():
    model, ids = CASES[1].build(), batches()[0]
    lower(model, ["bf16", "int8"])
    whole, state, parts = model(ids).logits, None, []
    for token in ids.split(1, 1):
        output = model(token, memory_state=state)
        state = output.memory_state
        parts.append(output.logits)
    assert all(t.dtype != torch.bfloat16 for _, t in state.named_tensors())
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0.1, atol=0.1)


def test_what_cannot_be_lowered_is_refused():
    model = CASES[0].build()
    for levels in (["int8"], ["int8", "fp8", "full"]):
        with pytest.raises(ValueError, match="one of"):
            lower(model, levels)
    shared = next(case for case in cases() if case.name == "chapters-factorized-sequence-sequence-shared")
    with pytest.raises(ValueError, match="per_layer"):
        lower(shared.build(), ["full", "full"])


def test_the_stored_choices_keep_their_budgets_and_are_in_the_diary():
    results = [Precision(**row) for row in STORED]
    assert all(r.error <= r.budget and set(r.levels) <= set(LEVELS) for r in results)
    assert results[0].levels == ["full"] * len(results[0].levels)
    assert [r.nbytes for r in results] == sorted((r.nbytes for r in results), reverse=True)
    assert to_table(results) in (ROOT / "docs/diary.md").read_text(encoding="utf-8")
