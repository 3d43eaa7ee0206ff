"""External memory against its equations in plain loops over rows, heads and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from memlib.config import Config, ConfigError, ExternalMemoryConfig, override
from memlib.lab.trace import record
from memlib.memory import ExternalMemory
from memlib.memory.base import AttentionHeads
from memlib.memory.external.backends import least_retrieved, put
from memlib.memory.gates import HeadGate
from memlib.models import MemoryTransformer
from memlib.nn.attention import SelfAttention
from memlib.ops import put_rows
from memlib.training.optimizer import parameter_groups
from tests.laws import laws

B, N, D, H, C, J = 2, 5, 8, 2, 12, 4
K = D // H


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(hidden, attended, logsumexp=None):
    """A layer's attention whose queries, keys and values the memory does not ask for."""
    return AttentionHeads(hidden, attended, attended, attended, attended, logsumexp, None)


def memory(**options):
    """A memory with every parameter moved off its start."""
    torch.manual_seed(0)
    config = ExternalMemoryConfig(**({"num_heads": H, "capacity": C, "top_k": J} | options))
    built = ExternalMemory(config, D).double()
    with torch.no_grad():
        for i, parameter in enumerate(built.parameters()):
            parameter += 0.3 * random(*parameter.shape, seed=i)
    return built


def everything(n=N):
    return torch.ones(B, n, dtype=torch.bool)


def written(built, segments=2, seed=10):
    """The state after some segments, and the segments: [b t d]."""
    state, hidden = built.init_state(B), random(B, segments * N, D, seed=seed)
    for segment in hidden.split(N, 1):
        state = built.write(segment, state, everything())
    return state, hidden


def unit(x):
    return x / torch.linalg.vector_norm(x)


def pairs(built, stream):
    """What one row's tokens are filed as, one by one: keys, values [h t k]; stream: [t d]."""
    keys, values, before = [], [], torch.zeros(D, dtype=torch.float64)
    for x in stream:
        key = built.key_address.weight @ (built.shift * before + (1 - built.shift) * x)
        keys.append(torch.stack([unit(key[h * K : (h + 1) * K]) for h in range(H)]))
        values.append(rearrange(built.v_proj.weight @ x, "(h k) -> h k", h=H))
        before = x
    return torch.stack(keys, 1), torch.stack(values, 1)


def retrieved(built, x, keys, values):
    """By head, for one token: its best tokens, their scores and what their softmax gives."""
    query = built.query_address.weight @ x
    for h in range(H):
        score = built.sharpness[h] * (keys[h] @ unit(query[h * K : (h + 1) * K]))
        best = sorted(range(len(score)), key=lambda t: -float(score[t]))[:J]
        if built.config.newest_within is not None:
            near = [t for t in best if score[t] >= score[best[0]] - built.config.newest_within]
            best = [t for t in best if t not in near or t == max(near)]
        yield best, score[best], F.softmax(score[best], 0) @ values[h, best]


@pytest.mark.parametrize(
    "options", [{}, {"shared_address": False}, {"shift_init": 0.3}, {"newest_within": 8.0}], ids=str
)
@pytest.mark.parametrize("segments", [1, 2, 4], ids=lambda n: f"{n}_segments")
@torch.no_grad()
def test_read_is_its_equations_token_by_token(options, segments):
    """Two tokens do not fill the hits; four segments are more than the memory holds."""
    built = memory(**options)
    state, stream = written(built, segments)
    hidden = random(B, 3, D, seed=40)
    got = built.read(hidden, state)
    for b in range(B):
        keys, values = (part[:, -C:] for part in pairs(built, stream[b]))
        for n in range(3):
            mean = torch.cat([m for _, _, m in retrieved(built, hidden[b, n], keys, values)])
            torch.testing.assert_close(got[b, n], built.o_proj.weight @ mean)


@torch.no_grad()
def test_of_two_values_under_one_key_the_newest_counts_by_rule_only():
    """One token before two others in turn: asked for again, it gives the later one, or their mean."""
    x, early, late = random(3, D)
    for options, want in (({}, (early + late) / 2), ({"newest_within": 0.5}, late)):
        built = memory(shift_init=1.0, sharpness=100.0, **options)
        torch.nn.init.ones_(built.shift)
        state = built.init_state(1)
        for token in (x, early, x, late):
            state = built.write(token[None, None], state, torch.ones(1, 1, dtype=torch.bool))
        want = built.o_proj.weight @ built.v_proj.weight @ want
        torch.testing.assert_close(built.read(x[None, None], state)[0, 0], want, atol=1e-3, rtol=1e-3)


def test_mixing_by_head_is_two_softmaxes_and_a_gate():
    built = memory(join="heads", gate_init=0.4)
    state, stream = written(built)
    hidden, attended = random(B, 3, D, seed=40), random(B, H, 3, K, seed=41)
    got = built.mix(heads_of(hidden, attended), state)
    for b in range(B):
        keys, values = pairs(built, stream[b])
        for n in range(3):
            for h, (_, _, mean) in enumerate(retrieved(built, hidden[b, n], keys, values)):
                g = 1 / (1 + math.exp(-built.gate.bias[h]))
                torch.testing.assert_close(got[b, h, n], (1 - g) * attended[b, h, n] + g * mean)


@torch.no_grad()
def test_joint_is_torchs_attention_over_window_and_hits_together():
    """One softmax over both: the mixture by shares against one call with all keys in one row."""
    built = memory(join="joint")
    built.gate.bias.zero_()
    attention = SelfAttention(D, H, use_rope=False).double()
    state, stream = written(built)
    hidden, nothing = random(B, 3, D, seed=40), random(B, H, 0, K)

    window = attention.attend(attention.project(hidden), nothing, nothing, None, logsumexp=True)
    local_keys, local_values = window.keys, window.values
    heads = heads_of(hidden, window.heads, window.logsumexp)
    got = attention.output(built.mix(heads, state))
    q = rearrange(attention.q_proj(hidden), "b n (h k) -> b h n k", h=H)
    for b in range(B):
        keys, values = pairs(built, stream[b])
        for n in range(3):
            out = []
            for h, (best, score, _) in enumerate(retrieved(built, hidden[b, n], keys, values)):
                local = local_keys[b, h, : n + 1] @ q[b, h, n] / math.sqrt(K)
                weight = F.softmax(torch.cat((local, score)), 0)
                out.append(weight @ torch.cat((local_values[b, h, : n + 1], values[h, best])))
            torch.testing.assert_close(got[b, n], attention.o_proj(torch.cat(out)))


@pytest.mark.parametrize("join", ["heads", "joint"])
def test_what_takes_part_in_the_attention_leaves_it_alone_when_empty_or_closed(join):
    built = memory(join=join)
    attended = random(B, H, 3, K)
    for state in (built.init_state(B), written(built)[0]):
        got = built.mix(heads_of(random(B, 3, D, seed=1), attended, random(B, H, 3, seed=2)), state)
        assert torch.equal(got, attended)
        built.close()


def test_an_empty_memory_says_nothing():
    built = memory()
    assert not built.read(random(B, 3, D), built.init_state(B)).any()


@pytest.mark.parametrize("options", [{}, {"eviction": "least_retrieved"}, {"chunk": 2}], ids=str)
@pytest.mark.parametrize("join", ["fusion", "heads", "joint"])
def test_gradients_are_those_of_the_values_through_reading_and_writing(options, join):
    """Everything the retrieval picks is held still by tiny steps; also across an eviction."""
    built = memory(join=join, capacity=6, top_k=2, **options)

    def run(first, second, hidden, attended):
        state = built.init_state(B)
        for segment in (first, second):
            state = built.write(segment, state, everything(4))
        if join == "fusion":
            return built.read(hidden, state)
        return built.mix(heads_of(hidden, attended, attended.sum(-1)), state)

    parts = [random(B, n, D, seed=n).requires_grad_() for n in (4, 4, 3)]
    assert torch.autograd.gradcheck(run, [*parts, random(B, H, 3, K).requires_grad_()])
    torch.autograd.backward(run(*parts, random(B, H, 3, K)).sum())
    assert all(p.grad is not None and p.grad.any() for p in built.parameters())


@pytest.mark.parametrize("eviction", ["oldest", "least_retrieved"])
def test_overflow(eviction):
    """The newest items come back, each with its own value, also where chunks do not divide the capacity."""
    built = memory(shift_init=0.0, capacity=10, top_k=4, eviction=eviction)
    with torch.no_grad():
        built.query_address.weight.copy_(torch.eye(D))
        built.shift.zero_()
        built.sharpness.fill_(1e7)
    if eviction == "oldest":
        laws.overflow(built, 10, D)
    else:  # what is asked for stays: other items make room
        with pytest.raises(AssertionError, match="L6 overflow"):
            laws.overflow(built, 10, D)


def test_a_value_that_is_filed_a_place_off_is_caught():
    class Shifted(ExternalMemory):
        def write(self, hidden, state, mask):
            state = super().write(hidden, state, mask)
            return type(state)(**{**vars(state), "values": state.values.roll(1, 2)})

    built = memory(shift_init=0.0, capacity=10)
    built.__class__ = Shifted
    with torch.no_grad():
        built.sharpness.fill_(1e7)
        built.shift.zero_()
        with pytest.raises(AssertionError, match="L6 overflow"):
            laws.overflow(built, 10, D)


@torch.no_grad()
def test_from_the_start_a_token_finds_what_followed_it_sixty_segments_ago():
    """Untrained: one address, unit keys and the token shift are enough, whatever the distance."""
    torch.manual_seed(0)
    config = ExternalMemoryConfig(num_heads=2, capacity=400, top_k=8, sharpness=100.0)
    built = ExternalMemory(config, 32).double()
    stream = F.normalize(random(1, 305, 32), dim=-1)
    state = built.init_state(1)
    for segment in stream.split(N, 1):
        state = built.write(segment, state, everything()[:1])
    for place in (0, 4, 150, 303):  # 4: the pair lies across a border of segments
        found, _ = built.retrieve(stream[:, place : place + 1], state)
        assert (found.serial[..., 0] == place + 1).all()
        torch.testing.assert_close(
            rearrange(found.mean, "1 h 1 k -> (h k)"), built.v_proj(stream[0, place + 1]), atol=1e-3, rtol=0
        )


def test_put_is_a_loop_and_copies():
    into, new = random(B, H, C, K), random(B, H, 3, K, seed=1)
    place, valid = torch.tensor([[3, 0, 7], [11, 1, 2]]), torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    want = into.clone()
    for b in range(B):
        for n in range(3):
            if valid[b, n]:
                want[b, :, place[b, n]] = new[b, :, n]
    before = into.clone()
    assert torch.equal(put_rows(into, new, place, valid), want) and torch.equal(into, before)
    serial, count = into[:, 0, :, 0], new[:, 0, :, 0]
    assert torch.equal(put(count, place, valid, serial), want[:, 0, :, 0])


def test_free_places_go_first_then_the_least_retrieved_then_the_oldest():
    serial = torch.tensor([[7, -1, 3, 5, 4, -1]])
    weight = torch.tensor([[0.0, 9.0, 2.0, 0.5, 0.5, 9.0]])
    assert least_retrieved(serial, weight, 6).tolist() == [[1, 5, 0, 4, 3, 2]]


def test_gates_train_at_the_gates_rate_without_decay():
    config = override(
        Config(),
        {"model.hidden_dim": 8, "model.num_heads": 2, "model.num_layers": 1, "memory.kinds": ["external"]}
        | {
            "memory.external.num_heads": 2,
            "memory.external.join": "heads",
            "memory.external.gate_init": -1.5,
        },
    )
    model = MemoryTransformer(config)
    (gate,) = (module for module in model.modules() if isinstance(module, HeadGate))
    assert gate.bias.tolist() == [-1.5, -1.5]
    (group,) = (
        g for g in parameter_groups(model, config.training) if any(p is gate.bias for p in g["params"])
    )
    assert group["name"] == "gates" and group["weight_decay"] == 0


@pytest.mark.parametrize("join", ["fusion", "heads", "joint"])
def test_a_recording_says_which_past_token_came_back(join):
    config = override(
        Config(),
        {"model.hidden_dim": 8, "model.num_heads": 2, "model.num_layers": 2, "model.vocab_size": 11}
        | {"model.segment_length": N, "memory.kinds": ["external"]}
        | {"memory.external.num_heads": 2, "memory.external.join": join}
        | {"memory.external.capacity": C, "memory.external.top_k": J},
    )
    model, tokens = MemoryTransformer(config), torch.randint(11, (B, 3 * N))
    with record(model) as trace:
        model(tokens)
    sizes = {"layer": 2, "batch": B, "head": 2, "token": 3 * N, "hit": J}
    for point in ("score", "source", "weight"):
        assert trace[f"external.{point}"].sizes == sizes
    source = trace["external.source"].values
    assert (source[..., :N, :] == -1).all()
    for start in (N, 2 * N):
        now = source[..., start : start + N, :]
        assert now.min() >= 0 and now.max() < start
    weight = trace["external.weight"].values.sum(-1)
    assert not weight[..., :N].any() and abs(weight[..., N:] - 1).max() < 1e-5
    assert ("external.gate" in trace) == (join != "fusion")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads = 5: must divide model.hidden_dim = 768"),
        ({"join": "joint"}, "num_heads = 4: must be model.num_heads = 12 for memory.external.join: joint"),
        ({"capacity": 100}, "capacity = 100: must be at least model.segment_length = 512"),
        ({"top_k": 5000}, "top_k = 5000: must be at most memory.external.capacity = 4096"),
        ({"chunk": 3}, "chunk = 3: must divide memory.external.capacity = 4096"),
        ({"chunk": 4, "eviction": "least_retrieved"}, "chunk = 4: the tokens of a chunk must be evicted"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"memory.external.{message}"):
        override(
            Config(),
            {"memory.kinds": ["external"], **{f"memory.external.{k}": v for k, v in changes.items()}},
        )


def test_a_memory_in_the_attention_has_no_residual_branch():
    with pytest.raises(
        ConfigError, match=r"memory.fusion = 'residual': memory.external is set to be read inside"
    ):
        override(
            Config(),
            {"memory.kinds": ["external"], "memory.fusion": "residual", "memory.external.join": "heads"}
            | {"memory.external.num_heads": 12},
        )
