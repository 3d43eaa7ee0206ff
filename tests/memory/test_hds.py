"""The hierarchy of states against its equations, token by token, and its promises about time."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange

from memlib import ConfigError, load_config, override
from memlib.config import HdsMemoryConfig
from memlib.memory.hds import HdsMemory

K, M, E, C, R, D, N = 3, 5, 4, 3, 2, 6, 4
SMALL = {"num_memories": K, "num_slots": M, "mem_dim": E, "address_dim": 4, "chunk_size": C, "num_blocks": R}


def make(stir: float = 0.5, **options) -> HdsMemory:
    torch.manual_seed(0)
    memory = HdsMemory(HdsMemoryConfig(**(SMALL | options)), D).double()
    with torch.no_grad():
        for p in memory.parameters():
            if p is not memory.banks.log_half_life:
                p.add_(stir * torch.randn_like(p))
    return memory


def segments(count: int, rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, rows, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


EVERYONE = torch.ones(2, N, dtype=torch.bool)
SOME = torch.tensor([[True, False, True, True], [True, True, False, False]])


def test_banks_are_the_loop_over_tokens():
    """M_k <- decay_tk M_k + i_t p_tk a_tks v_t, one token after another; padding changes nothing."""
    memory = make()
    level, hidden = memory.banks, segments(1)[0]
    start = torch.randn(2, K, M, E, dtype=torch.float64)
    for mask in (EVERYONE, SOME):
        expected = start.clone()
        for b in range(2):
            before = torch.zeros(D, dtype=torch.float64)
            for t in range(N):
                x = hidden[b, t] * mask[b, t]
                context = torch.cat((x, before))
                key = torch.lerp(x, before, level.shift)
                before = x
                if not mask[b, t]:
                    continue
                a = rearrange(level.address(key[None, None])[0, 0], "(k s) -> k s", k=K)
                i = torch.sigmoid(level.input_gate(context))
                p = torch.softmax(level.write_gate(context), -1)
                pace = 2 * torch.sigmoid(level.pace_gate(context))
                decay = 2 ** (-pace / (level.half_lives * N))
                v = torch.tanh(level.v_proj(x))
                for k in range(K):
                    expected[b, k] = decay[k] * expected[b, k] + i * p[k] * a[k][:, None] * v
        torch.testing.assert_close(level.write(hidden, start, mask), expected)


def test_reading_is_the_levels_mixed():
    memory, hidden = make(), segments(3)
    state = memory.init_state(2)
    for segment in hidden[:2]:
        state = memory.write(segment, state, EVERYONE)
    x = hidden[2]
    share = torch.softmax(memory.banks.read_gate(x), -1)
    address = rearrange(memory.banks.address(x), "b n (k s) -> b n k s", k=K)
    found = sum(
        share[:, :, k, None] * torch.einsum("bns,bse->bne", address[:, :, k], state.banks[:, k])
        for k in range(K)
    )
    level_1 = memory.blocks.read(x, state.level_1)
    level_2 = (state.level_2.mean @ memory.summary.v_proj.weight.T)[:, None].expand_as(x)
    levels = [memory.token(x), level_1, level_2, memory.banks.o_proj(found)]
    weight = torch.softmax(memory.gate(x), -1)
    expected = sum(weight[..., l, None] * level for l, level in enumerate(levels))
    torch.testing.assert_close(memory.read(x, state), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_the_last_complete_chunks_of_real_tokens(masked):
    memory = make()
    state, seen = memory.blocks.init_state(2), [[], []]
    for i, segment in enumerate(segments(6)):
        mask = SOME if masked and i % 2 else EVERYONE
        state = memory.blocks.write(segment, state, mask)
        for b in range(2):
            seen[b] += [x for x, real in zip(segment[b], mask[b], strict=True) if real]
            chunks = [torch.stack(seen[b][j : j + C]).mean(0) for j in range(0, len(seen[b]) // C * C, C)]
            kept = chunks[-R:]
            assert state.complete[b].sum() == len(kept)
            if kept:
                torch.testing.assert_close(state.blocks[b, state.complete[b]], torch.stack(kept))
            assert state.filled[b] == len(seen[b]) % C


@pytest.mark.parametrize("tokens", [C - 1, C, C + 1])
def test_a_block_is_seen_when_complete_and_not_before(tokens):
    """At the block's border ± 1: two streams that differ in their first token read alike until it is full."""
    memory = make()
    first = torch.zeros(1, tokens, D, dtype=torch.float64)
    other = first.clone()
    other[0, 0] = 1
    mask = torch.ones(1, tokens, dtype=torch.bool)
    ask = torch.randn(1, N, D, dtype=torch.float64)
    said = [
        memory.blocks.read(ask, memory.blocks.write(x, memory.blocks.init_state(1), mask))
        for x in (first, other)
    ]
    assert torch.equal(*said) == (tokens < C)


def test_nothing_complete_reads_as_nothing():
    memory = make()
    assert not memory.blocks.read(segments(1)[0], memory.blocks.init_state(2)).any()


def test_summary_is_the_mean_of_all_real_tokens():
    memory = make()
    state, seen = memory.summary.init_state(2), [[], []]
    for i, segment in enumerate(segments(5)):
        mask = SOME if i == 2 else EVERYONE
        state = memory.summary.write(segment, state, mask)
        for b in range(2):
            seen[b] += [x for x, real in zip(segment[b], mask[b], strict=True) if real]
    torch.testing.assert_close(state.mean, torch.stack([torch.stack(s).mean(0) for s in seen]))
    assert state.count.tolist() == [len(s) for s in seen]


@pytest.mark.parametrize("decay", ["trained", "fixed"])
def test_half_lives_are_what_they_say(decay):
    """H segments of neutral tokens that write nothing take a bank to half, whatever a segment's length."""
    memory = make(stir=0, half_life_min=2.0, half_life_max=8.0, decay=decay)
    torch.testing.assert_close(memory.half_lives, torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64))
    with torch.no_grad():
        memory.banks.input_gate.bias.fill_(-torch.inf)
    for n in (2, 16):
        banks = torch.ones(1, K, M, E, dtype=torch.float64)
        hidden, mask = torch.randn(1, n, D, dtype=torch.float64), torch.ones(1, n, dtype=torch.bool)
        for segment in range(1, 9):
            banks = memory.banks.write(hidden, banks, mask)
            expected = [2 ** (-segment / h) for h in (2, 4, 8)]
            torch.testing.assert_close(banks[0, :, 0, 0], torch.tensor(expected, dtype=torch.float64))


def test_fixed_half_lives_do_not_train():
    assert not make(decay="fixed").banks.log_half_life.requires_grad
    assert make(decay="fixed").banks.pace_gate is None
    assert make().banks.log_half_life.requires_grad


def test_tokens_can_choose_their_bank():
    """Learned specialisation: with the gate wide to one bank, only that bank changes."""
    memory = make(stir=0)
    with torch.no_grad():
        memory.banks.write_gate.bias.copy_(torch.tensor([0.0, torch.inf, 0.0]).nan_to_num(posinf=1e3))
    banks = memory.banks.write(segments(1)[0], memory.init_state(2).banks, EVERYONE)
    assert banks[:, 1].abs().max() > 0 and not banks[:, [0, 2]].any()


def test_gradients():
    memory, hidden = make(), segments(3)

    def run(first, second, ask):
        state = memory.init_state(2)
        for segment in (first, second):
            state = memory.write(segment, state, SOME)
        return memory.read(ask, state)

    leaves = [segment.clone().requires_grad_() for segment in hidden]
    assert torch.autograd.gradcheck(run, leaves)
    run(*leaves).sum().backward()
    named = {name: p.grad for name, p in memory.named_parameters()}
    assert [name for name, grad in named.items() if grad is None or not grad.any()] == []


def test_accumulates_and_never_overwrites():
    """Without decay, what two segments wrote is the sum of what each wrote (C3)."""
    memory = make(half_life_min=1e9, half_life_max=1e9, decay="fixed")
    one, two = segments(2)
    empty = memory.init_state(2).banks
    both = memory.banks.write(two, memory.banks.write(one, empty, EVERYONE), EVERYONE)
    alone = [memory.banks.write(x, empty, EVERYONE) for x in (one, two)]
    torch.testing.assert_close(both, alone[0] + alone[1], atol=1e-6, rtol=1e-6)


def test_bad_half_lives_are_refused():
    with pytest.raises(ConfigError, match=r"memory\.hds\.half_life_min, half_life_max = 8, 2"):
        override(
            load_config("recall_hds"), {"memory.hds.half_life_min": 8.0, "memory.hds.half_life_max": 2.0}
        )


def test_documented_size():
    """8 banks of 1024 slots of 512: 8,192 slots; what a stream's state weighs follows."""
    with torch.device("meta"):
        memory = HdsMemory(HdsMemoryConfig(), 768)
        state = memory.init_state(1)
    assert state.banks.shape == (1, 8, 1024, 512)
    assert math.prod(state.banks.shape[1:3]) == 8192


@pytest.mark.slow
def test_it_learns_recall_and_its_control_does_not():
    from memlib import Trainer
    from tests.learning.early import train_until_learned

    scores = {}
    for name in ("recall_hds", "recall_baseline"):
        trainer = Trainer(override(load_config(name), {"training.max_steps": 100}))
        train_until_learned(trainer)
        scores[name] = trainer.evaluate(segments=4).accuracy
    assert scores["recall_hds"] > 0.95 and abs(scores["recall_baseline"] - 1 / 16) < 0.03
