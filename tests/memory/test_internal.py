"""LM2's memory against its equations in plain loops over rows, tokens and slots."""

import math

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from memlib.config import InternalMemoryConfig
from memlib.memory import InternalMemory
from memlib.memory.internal import SlotState
from memlib.ops import gated_write

B, N, D, S, H = 2, 5, 6, 8, 2


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(**options):
    """A memory with every parameter moved off its start."""
    torch.manual_seed(0)
    config = InternalMemoryConfig(**({"num_slots": S, "num_heads": H} | options))
    built = InternalMemory(config, D).double()
    with torch.no_grad():
        for i, parameter in enumerate(built.parameters()):
            parameter += 0.5 * random(*parameter.shape, seed=i)
    return built


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


MASKS = {
    "all_tokens": torch.ones(B, N, dtype=torch.bool),
    "padded": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


# gated_write


def write_parts(seed=0):
    """slots [b s e], strength and erase [b n s] in (0, 1), values [b n e]."""
    strength, erase = sigmoid(random(B, N, S, seed=seed)), 0.9 * sigmoid(random(B, N, S, seed=seed + 1))
    return random(B, S, 3, seed=seed + 2), strength, erase, random(B, N, 3, seed=seed + 3)


def test_gated_write_is_a_loop_over_tokens():
    slots, strength, erase, values = write_parts()
    want = slots.clone()
    for b in range(B):
        for t in range(N):
            for s in range(S):
                want[b, s] = (1 - erase[b, t, s]) * want[b, s] + strength[b, t, s] * values[b, t]
    torch.testing.assert_close(gated_write(slots, strength, erase, values), want)


def test_gated_write_has_the_gradient_of_its_values():
    parts = [part.requires_grad_() for part in write_parts()]
    assert torch.autograd.gradcheck(gated_write, parts)


def test_writing_nothing_keeps_every_bit():
    slots, strength, erase, values = write_parts()
    assert torch.equal(gated_write(slots, 0 * strength, 0 * erase, values), slots)


def test_erasing_all_leaves_the_last_value_and_finite_gradients():
    slots, strength, erase, values = (part.float().requires_grad_() for part in write_parts())
    ones = torch.ones_like(erase, requires_grad=True)
    got = gated_write(slots, ones, ones, values)
    want = rearrange(values[:, -1], "b e -> b 1 e").expand_as(got)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    got.square().sum().backward()
    assert all(torch.isfinite(part.grad).all() for part in (slots, ones, values))


# write: addressed


def addressed(module, x):
    """The address of one feature vector: [s], slot s of head h at h * S / H + s."""
    query = rearrange(module.proj.weight @ x, "(h k) -> h k", h=H)
    address = torch.zeros(S, dtype=torch.float64)
    for h in range(H):
        score = torch.stack([module.sharpness * query[h] @ module.table[h, s] for s in range(S // H)])
        for s, weight in enumerate(F.softmax(score, 0)):
            address[h * S // H + s] = weight
    return address


@masks
@torch.no_grad()
def test_addressed_write_is_its_equations_token_by_token(mask):
    built = memory(shift_init=0.7)
    writer, hidden, slots = built.writer, random(B, N, D, seed=40), random(B, S, D, seed=41)
    want = slots.clone()
    for b in range(B):
        before = torch.zeros(D, dtype=torch.float64)
        for t in range(N):
            x = hidden[b, t] * mask[b, t]
            if mask[b, t]:
                key = writer.shift * before + (1 - writer.shift) * x
                context = torch.cat((x, before))
                opened, kept = sigmoid(writer.input_gate(context)), sigmoid(writer.forget_gate(context))
                value = torch.tanh(writer.v_proj.weight @ x)
                strength = opened * addressed(writer.address, key)
                for s in range(S):
                    want[b, s] = (1 - strength[s] * (1 - kept)) * want[b, s] + strength[s] * value
            before = x
    got = built.write(hidden, SlotState(slots), mask).slots
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_addressed_read_is_its_equation_token_by_token():
    built = memory()
    reader, hidden, slots = built.reader, random(B, N, D, seed=40), random(B, S, D, seed=41)
    got = built.read(hidden, SlotState(slots))
    for b in range(B):
        for t in range(N):
            weight = addressed(reader.address, hidden[b, t]) / H
            read = reader.o_proj.weight @ sum(weight[s] * slots[b, s] for s in range(S))
            want = sigmoid(reader.output_gate.gate(read)) * read
            torch.testing.assert_close(got[b, t], want)


@torch.no_grad()
def test_an_address_sums_to_one_over_each_heads_slots():
    address = memory().writer.address(random(B, N, D))
    per_head = rearrange(address, "b n (h s) -> b n h s", h=H).sum(-1)
    torch.testing.assert_close(per_head, torch.ones_like(per_head))


def test_reading_and_writing_share_one_address():
    built = memory()
    assert built.reader.address is built.writer.address


def test_a_shut_input_gate_leaves_every_slot_exactly_as_it_was():
    built = memory()
    with torch.no_grad():
        built.writer.input_gate.bias.fill_(-torch.inf)
    state = SlotState(random(B, S, D))
    assert torch.equal(built.write(random(B, N, D), state, MASKS["all_tokens"]).slots, state.slots)


@torch.no_grad()
def test_from_the_start_a_value_is_found_under_the_key_before_it():
    """Read back with the key, the memory says the value's own write, at sharp addresses."""
    torch.manual_seed(0)
    config = InternalMemoryConfig(
        num_slots=64, num_heads=2, address_sharpness=200.0, input_bias=9.0, forget_bias=-9.0
    )
    built = InternalMemory(config, 32).double()
    key, value, other = (F.normalize(random(1, 1, 32, seed=s), dim=-1) for s in (1, 2, 3))
    mask = torch.ones(1, 2, dtype=torch.bool)
    state = built.write(torch.cat((key, value), 1), built.init_state(1), mask)

    def found(query):
        weight = built.reader.address(query) / config.num_heads
        return weight @ state.slots

    written = torch.tanh(built.writer.v_proj(value))
    torch.testing.assert_close(found(key), written, atol=1e-3, rtol=0)
    assert (found(other) - written).abs().max() > 0.05


# write: attention


def heads(x):
    return rearrange(x, "j (h k) -> h j k", h=H)


def attend(q, k, v):
    """Plain multi-head attention of one row: q [i e], k and v [j e] -> [i e]."""
    out = []
    for q_h, k_h, v_h in zip(heads(q), heads(k), heads(v), strict=True):
        out.append(F.softmax(q_h @ k_h.T / math.sqrt(q_h.shape[-1]), -1) @ v_h)
    return rearrange(torch.stack(out), "h i k -> i (h k)")


def rms(x, weight):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@masks
@torch.no_grad()
def test_attention_write_is_its_equations_row_by_row(mask):
    """Only the valid tokens of a row exist: the others are left out altogether."""
    built = memory(write="attention", slot_dim=4)
    w, hidden, slots = built.writer, random(B, N, D, seed=40), random(B, S, 4, seed=41)
    got = built.write(hidden, SlotState(slots), mask).slots
    for b in range(B):
        x, m = w.in_proj(hidden[b, mask[b]]), slots[b]
        source = torch.cat((m, x))
        update = rms(m + attend(w.q_proj(m), w.k_proj(source), w.v_proj(source)), w.attended_norm.weight)
        update = torch.tanh(rms(update + w.mlp(update), w.mlp_norm.weight))
        context = torch.cat((x.mean(0).expand(S, -1), torch.tanh(m)), -1)
        want = sigmoid(w.forget_gate(context)) * m + sigmoid(w.input_gate(context)) * update
        torch.testing.assert_close(got[b], want)


@torch.no_grad()
def test_attention_read_is_its_equation_row_by_row():
    built = memory(write="attention", slot_dim=4)
    r, hidden, slots = built.reader, random(B, N, D, seed=40), random(B, S, 4, seed=41)
    got = built.read(hidden, SlotState(slots))
    for b in range(B):
        read = r.o_proj(attend(r.q_proj(hidden[b]), r.k_proj(slots[b]), r.v_proj(slots[b])))
        torch.testing.assert_close(got[b], sigmoid(r.output_gate.gate(read)) * read)


# both


@pytest.mark.parametrize("write", ["addressed", "attention"])
def test_gates_start_at_their_configured_bias(write):
    config = InternalMemoryConfig(num_slots=S, num_heads=H, write=write, input_bias=-2.0, forget_bias=3.0)
    built = InternalMemory(config, D)
    for gate, bias in ((built.writer.input_gate, -2.0), (built.writer.forget_gate, 3.0)):
        assert not gate.weight.any() and (gate.bias == bias).all()
    assert not built.reader.output_gate.gate.weight.any()


@pytest.mark.parametrize("write", ["addressed", "attention"])
def test_without_output_gate_what_is_read_passes_whole(write):
    gated, bare = memory(write=write), memory(write=write, output_gate=False)
    bare.load_state_dict({k: v for k, v in gated.state_dict().items() if "output_gate" not in k})
    state = SlotState(random(B, S, D))
    read = bare.read(random(B, N, D), state)
    want = sigmoid(gated.reader.output_gate.gate(read)) * read
    torch.testing.assert_close(gated.read(random(B, N, D), state), want)


@pytest.mark.parametrize("write", ["addressed", "attention"])
@pytest.mark.parametrize(("slots", "width"), [(8, None), (2, 4), (32, 4), (6, 12)])
def test_slots_tokens_and_widths_are_free(write, slots, width):
    """LM2's code needs slots = tokens = width."""
    built = memory(write=write, num_slots=slots, slot_dim=width)
    state = built.init_state(3)
    assert state.slots.shape == (3, slots, width or D)
    for n in (1, 7):
        hidden = random(3, n, D)
        state = built.write(hidden, state, torch.ones(3, n, dtype=torch.bool))
        assert built.read(hidden, state).shape == hidden.shape
    assert torch.isfinite(state.slots).all()
