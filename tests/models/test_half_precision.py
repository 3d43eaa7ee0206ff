"""Weights in half precision: the state stays float32, nothing becomes infinite, and results stay near."""

from dataclasses import replace

import pytest
import torch

from tests.laws.cases import BATCH, SEGMENT, VOCAB, cases

VARIANTS = [case for case in cases() if case.name.endswith("per_layer")]
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def stream(tokens):
    return torch.randint(VOCAB, (BATCH, tokens), generator=torch.Generator().manual_seed(0))


def run(model, context=None):
    state, logits, ids = None, [], stream(5 * SEGMENT + 2)
    for part in ids.split(SEGMENT + 1, 1):
        output = model(part, memory_state=state)
        state = output.memory_state
        logits.append(output.logits)
    return torch.cat(logits, 1), state


def check(logits, state, whole):
    assert torch.isfinite(logits).all()
    for name, tensor in state.named_tensors():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
            assert torch.isfinite(tensor).all(), name
    first = slice(0, SEGMENT)  # later, a choice among nearly equal items may fall otherwise
    gap = (logits[:, first].float() - whole[:, first]).norm() / whole[:, first].norm()
    assert gap < 0.1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", VARIANTS, ids=str)
@torch.no_grad()
def test_half_weights_keep_a_float32_state(case, dtype):
    whole, _ = run(case.fresh().float())
    check(*run(case.fresh().to(HALF[dtype])), whole)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_autocast_trains_with_a_float32_state(case):
    whole, _ = run(case.fresh().float())
    model = case.fresh().float().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = run(model)
        loss = logits.float().square().mean()
    check(logits.detach(), state.detach(), whole.detach())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_a_state_that_is_rounded_at_each_write_is_caught():
    """A mutant: writes that come back in the weights' type."""
    case = next(case for case in VARIANTS if "internal-addressed" in case.name)
    model = case.fresh().to(torch.bfloat16)
    for memory in (memory for _, _, memory in model.stack):
        write = memory.write
        memory.write = lambda *given, write=write: write(*given).cast(torch.bfloat16)
    _, state = run_once(model)
    with pytest.raises(AssertionError, match="slots"):
        check(torch.zeros(1), state, torch.ones(1))


def run_once(model):
    output = model(stream(SEGMENT))
    return output.logits, output.memory_state


@torch.no_grad()
def drift(round_state, segments=256, every=64):
    """Relative error of the longest-lived bank beside a float32 model's, as the stream goes on."""
    case = next(case for case in VARIANTS if case.name.startswith("hds-fixed"))
    case = replace(case, kinds={"hds": case.kinds["hds"] | {"half_life_max": 1024.0}})
    whole, half = case.fresh().float(), case.fresh().to(torch.bfloat16)
    mine = theirs = None
    found = []
    for number, part in enumerate(stream(segments * SEGMENT).split(SEGMENT, 1), 1):
        theirs = whole(part, memory_state=theirs).memory_state
        mine = half(part, memory_state=mine).memory_state
        if round_state:
            mine = mine.cast(torch.bfloat16).cast(torch.float32)
        if number % every == 0:
            a, b = (dict(state.named_tensors())["memories.0.banks"][:, -1] for state in (mine, theirs))
            found.append(float((a - b).norm() / b.norm()))
    return found


def test_a_bank_that_lives_a_thousand_segments_does_not_drift_in_bf16():
    """Its writes are smaller than bf16 resolves beside what it holds: rounded at each write, it drifts."""
    kept, rounded = drift(False), drift(True)
    assert max(kept) < 2**-8 and kept[-1] <= 1.25 * kept[0]
    assert rounded[-1] > 1.5 * rounded[0] and rounded[-1] > 4 * kept[-1]
