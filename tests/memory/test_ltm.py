"""The LTM transformer's bank against its equations in plain loops over rows, tokens and slots."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from memlib.config import Config, ConfigError, LtmMemoryConfig, override
from memlib.memory import LongTermMemory
from memlib.memory.ltm import LtmState, lottery, survivors
from memlib.nn.hook_point import HookPoint

B, N, D, S, E = 2, 6, 5, 8, 4
MASKS = {
    "all_tokens": torch.ones(B, N, dtype=torch.bool),
    "padded": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool(),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(**options):
    """A memory with every parameter moved off its start."""
    torch.manual_seed(0)
    config = LtmMemoryConfig(**({"num_slots": S, "slot_dim": E} | options))
    built = LongTermMemory(config, D).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(built.parameters()):
            parameter += 0.5 * random(*parameter.shape, seed=i)
    return built


def state():
    return LtmState(random(B, S, E, seed=41), torch.zeros(B, S, dtype=torch.int64), torch.tensor([3, 7]))


def heard(built, point, call):
    """What a hook point is told during a call, or what a module returns."""
    values, module = [], built.get_submodule(point)
    if isinstance(module, HookPoint):
        module.listeners.append(values.append)
        call()
        module.listeners.clear()
    else:
        handle = module.register_forward_hook(lambda _m, _i, out: values.append(out))
        call()
        handle.remove()
    return values[0]


# the write


def compressed(writer, hidden):
    """One row's tokens, all of which count, at the bank's width, and the logits of their importance."""
    new, logits = [], []
    before = torch.zeros(D, dtype=torch.float64)
    for x in hidden:
        key = writer.key.proj.weight @ (writer.key.shift * before + (1 - writer.key.shift) * x)
        new.append(torch.cat((key / key.norm(), torch.tanh(writer.v_proj.weight @ x))))
        logits.append(float(writer.importance_gate(new[-1])))
        before = x
    return new, logits


@masks
@pytest.mark.parametrize("ratio", [0.01, 0.34, 0.5, 1.0])
@torch.no_grad()
def test_write_is_its_equations_token_by_token(mask, ratio):
    """Only the tokens that count exist; of those the ceil(ratio n') most important are written in turn."""
    built, hidden, given = memory(memory_compression_ratio=ratio), random(B, N, D, seed=40), state()
    got = built.write(hidden, given, mask)
    for b in range(B):
        new, logits = compressed(built.writer, hidden[b, mask[b]])
        count = math.ceil(ratio * len(new))
        chosen = sorted(sorted(range(len(new)), key=lambda t: -logits[t])[:count])
        bank = given.slots[b].clone()
        for t in chosen:
            scores = [
                built.reader.attention.sharpness * math.sqrt(E // 2) * new[t][: E // 2] @ slot[: E // 2]
                for slot in given.slots[b]
            ]
            address = F.softmax(torch.stack(scores), 0)
            for s in range(S):
                g = address[s] / (1 + math.exp(-logits[t]))
                bank[s] = (1 - g) * bank[s] + g * new[t]
        torch.testing.assert_close(got.slots[b], bank)
    assert got.segments.tolist() == [4, 8]


@torch.no_grad()
def test_read_is_attention_by_the_slots_keys_over_what_they_say():
    built, hidden, given = memory(), random(B, N, D, seed=40), state()
    got = built.read(hidden, given)
    for b in range(B):
        for t in range(N):
            query = F.normalize(built.key.proj.weight @ hidden[b, t], dim=0)
            score = built.reader.attention.sharpness * math.sqrt(E // 2) * given.slots[b, :, : E // 2] @ query
            said = F.softmax(score, 0) @ given.slots[b, :, E // 2 :]
            torch.testing.assert_close(got[b, t], built.reader.o_proj.weight @ said)


@torch.no_grad()
def test_sparse_reading_of_every_slot_is_dense_reading():
    sparse, dense = memory(attention="sparse", top_k=S), memory()
    hidden = random(B, N, D, seed=40)
    torch.testing.assert_close(sparse.read(hidden, state()), dense.read(hidden, state()))
    few = memory(attention="sparse", top_k=2)
    weight = heard(few, "reader.attention.weight_point", lambda: few.read(hidden, state()))
    assert ((weight > 0).sum(-1) == 2).all()


def test_reading_and_writing_share_their_keys_and_scores():
    built = memory()
    assert built.reader.key is built.writer.key and built.reader.attention is built.writer.attention


# what survives


@pytest.mark.parametrize(("n", "ratio", "count"), [(6, 1.0, 6), (6, 0.5, 3), (6, 0.34, 3), (6, 0.01, 1)])
def test_so_many_survive_as_the_ratio_says(n, ratio, count):
    order = random(50, n)
    mask = torch.ones(50, n, dtype=torch.bool)
    kept = survivors(order, mask, ratio)
    assert (kept.sum(-1) == count).all()
    lowest_kept = order.masked_fill(~kept, math.inf).amin(-1)
    assert (lowest_kept >= order.masked_fill(kept, -math.inf).amax(-1)).all()


def test_of_equals_the_earlier_survives_and_rounding_makes_no_difference():
    order = torch.tensor([[0.3, 0.1, 0.3 + 1e-12, 0.3, 0.1]], dtype=torch.float64)
    mask = torch.ones_like(order, dtype=torch.bool)
    assert survivors(order, mask, 0.4).tolist() == [[True, False, True, False, False]]


def test_padding_neither_survives_nor_counts():
    kept = survivors(torch.zeros(1, 6), torch.tensor([[0, 1, 1, 1, 1, 0]]).bool(), 0.5)
    assert kept.tolist() == [[False, True, True, False, False, False]]
    assert not survivors(torch.zeros(1, 3), torch.zeros(1, 3).bool(), 0.5).any()


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5])
def test_the_lottery_keeps_every_place_alike_and_changes_from_segment_to_segment(ratio):
    n, rounds = 16, 1000
    mask = torch.ones(rounds, n, dtype=torch.bool)
    kept = survivors(lottery(mask, torch.arange(rounds)), mask, ratio).double()
    error = 4 * math.sqrt(ratio * (1 - ratio) / rounds)
    assert (kept.mean(0) - ratio).abs().max() < error
    together = kept.T @ kept / rounds  # no two places hang together
    torch.testing.assert_close(
        together[0, 1:].mean(), torch.tensor(ratio * (16 * ratio - 1) / 15).double(), atol=0.02, rtol=0
    )


def test_the_lottery_asks_nothing_of_the_tokens():
    by_lot = memory(keep="random")
    one, two = random(B, N, D, seed=1), random(B, N, D, seed=2)
    kept = [
        heard(by_lot, "writer.kept_point", lambda x=x: by_lot.write(x, state(), MASKS["all_tokens"]))
        for x in (one, two)
    ]
    assert torch.equal(*kept)
    learned = memory(keep="learned")
    kept = [
        heard(learned, "writer.kept_point", lambda x=x: learned.write(x, state(), MASKS["all_tokens"]))
        for x in (one, two)
    ]
    assert not torch.equal(*kept)


# training


@torch.no_grad()
def test_without_exploration_training_writes_what_evaluation_writes():
    built, hidden = memory(exploration=0.0), random(B, N, D, seed=40)
    want = built.write(hidden, state(), MASKS["padded"]).slots
    got = built.train().write(hidden, state(), MASKS["padded"]).slots
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_exploration_chooses_by_importance_under_noise():
    """Gumbel top-1 of logits l is a draw from softmax(l)."""
    built = memory(exploration=1.0).train()
    logit = torch.tensor([[2.0, 0.0, 1.0, -1.0]], dtype=torch.float64).expand(20000, -1)
    torch.manual_seed(0)
    first = survivors(built.writer.explored(logit), torch.ones_like(logit, dtype=torch.bool), 0.25)
    torch.testing.assert_close(first.double().mean(0), F.softmax(logit[0], -1), atol=0.015, rtol=0)
    assert built.eval().writer.explored(logit) is logit


def backward(module, loss):
    """Backpropagate a loss, keeping the gradient of what a module gave out."""
    handle = module.register_forward_hook(lambda _module, _inputs, out: out.retain_grad())
    loss().backward()
    handle.remove()


def test_a_dropped_token_learns_what_a_little_of_it_would_have_been_worth():
    """The gradient at strength zero, by finite differences of a write in which it has a strength."""
    built = memory(memory_compression_ratio=0.5, exploration=0.0).train()
    writer, hidden, mask = built.writer, random(1, N, D, seed=40), MASKS["all_tokens"][:1]
    given = state().rows(torch.tensor([0]))
    target = random(1, S, E, seed=50)
    kept = heard(built, "writer.kept_point", lambda: built.write(hidden, given, mask))

    def loss():
        return (built.write(hidden, given, mask).slots * target).sum()

    logits = heard(built, "writer.importance_gate", lambda: backward(writer.importance_gate, loss))
    gradient = logits.grad[0, :, 0]

    def loss_with(t, strength):
        def push(*arguments):
            tokens = compress(*arguments)
            return replace(tokens, strength=tokens.strength + strength * (tokens.index == t))

        compress, writer.compress = writer.compress, push
        with torch.no_grad():
            value = float(loss())
        del writer.compress
        return value

    for t in (~kept[0]).nonzero().flatten().tolist():
        worth = (loss_with(t, 1e-6) - loss_with(t, 0.0)) / 1e-6
        assert float(gradient[t]) == pytest.approx(worth / 4, rel=1e-3, abs=1e-7)


def test_the_write_has_the_gradient_of_its_values():
    """What survives is fixed here (all of it): the choice itself has no gradient."""
    built, mask = memory(memory_compression_ratio=1.0), MASKS["padded"]

    def write(hidden, slots):
        return built.write(hidden, replace(state(), slots=slots), mask).slots

    inputs = [random(B, N, D, seed=40).requires_grad_(), random(B, S, E, seed=41).requires_grad_()]
    assert torch.autograd.gradcheck(write, inputs)


@torch.no_grad()
def test_from_the_start_a_value_is_found_under_the_key_before_it():
    torch.manual_seed(0)
    config = LtmMemoryConfig(memory_compression_ratio=1.0, sharpness=16.0, importance_bias=9.0)
    built = LongTermMemory(config, 32).double().eval()
    key, value, other = (5 * F.normalize(random(1, 1, 32, seed=s), dim=-1) for s in (1, 2, 3))
    built.reader.o_proj = torch.nn.Identity()
    given = built.init_state(1)
    mask = torch.ones(1, 2, dtype=torch.bool)
    after = built.write(torch.cat((key, value), 1), given, mask)
    written = torch.tanh(built.writer.v_proj(value))
    torch.testing.assert_close(built.read(key, after), written, atol=0.1, rtol=0)
    assert (built.read(other, after) - written).abs().max() > 0.3


# the options


def test_the_defaults_are_the_documents():
    config = LtmMemoryConfig()
    assert (config.num_slots, config.slot_dim, config.memory_compression_ratio) == (512, 64, 0.5)
    given = LongTermMemory(config, 48).init_state(3)
    assert given.slots.shape == (3, 512, 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory.ltm.slot_dim": 7}, "memory.ltm.slot_dim = 7: must be even"),
        ({"memory.ltm.memory_compression_ratio": 0.0}, "no token would be written"),
        ({"memory.ltm.memory_compression_ratio": 1.5}, "at most 1"),
    ],
)
def test_impossible_options_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        override(Config(), {"memory.kinds": ["ltm"]} | changes)
