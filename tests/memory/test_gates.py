import pytest
import torch
from torch.nn import functional as F

from memlib.memory.address import identity_slots
from memlib.memory.gates import Gate
from memlib.models.fusion import ResidualFusion, SoftmaxFusion


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_gate_starts_at_its_bias_whatever_it_sees():
    gate = Gate(6, 3, bias=-0.5).double()
    assert not gate.weight.any()
    assert torch.equal(gate(random(4, 6)), torch.full((4, 3), -0.5, dtype=torch.float64))


def softmax_fusion(memories):
    fusion = SoftmaxFusion(6, memories).double()
    with torch.no_grad():
        fusion.gate.weight.copy_(random(1 + memories, 6, seed=1))
        fusion.gate.bias.copy_(random(1 + memories, seed=2))
    return fusion


@pytest.mark.parametrize("memories", [1, 2])
def test_softmax_fusion_is_its_equation_token_by_token(memories):
    """H = g[0] A + g[1] M_1 + …, g = softmax(W_g h + b_g), summing to one."""
    fusion = softmax_fusion(memories)
    hidden, attended = random(2, 5, 6, seed=3), random(2, 5, 6, seed=4)
    read = [random(2, 5, 6, seed=5 + i) for i in range(memories)]
    weights = []
    fusion.weight_point.listeners.append(weights.append)
    got = fusion(hidden, attended, read)
    for b in range(2):
        for t in range(5):
            g = F.softmax(fusion.gate.weight @ hidden[b, t] + fusion.gate.bias, 0)
            sources = [attended, *read]
            want = sum(g[i] * sources[i][b, t] for i in range(1 + memories))
            torch.testing.assert_close(got[b, t], want)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_a_fresh_softmax_fusion_weighs_all_sources_alike():
    a, m = random(1, 2, 6, seed=1), random(1, 2, 6, seed=2)
    torch.testing.assert_close(SoftmaxFusion(6, 1).double()(random(1, 2, 6), a, [m]), (a + m) / 2)


def test_a_closed_softmax_fusion_is_what_was_attended_bit_for_bit():
    fusion = softmax_fusion(2)
    fusion.close()
    attended = random(2, 5, 6, seed=4)
    assert torch.equal(fusion(random(2, 5, 6), attended, [random(2, 5, 6)] * 2), attended)


def test_residual_fusion_adds_each_projected_memory():
    fusion = ResidualFusion(6, 2, init_zero=False).double()
    stream, read = random(2, 5, 6), [random(2, 5, 6, seed=i) for i in (1, 2)]
    want = stream + sum(m @ p.weight.T for m, p in zip(read, fusion.o_proj, strict=True))
    torch.testing.assert_close(fusion(stream, read), want)


def test_residual_fusion_starts_at_zero_and_learns_from_there():
    fusion = ResidualFusion(6, 1).double()
    stream, memory = random(2, 5, 6), random(2, 5, 6, seed=1)
    out = fusion(stream, [memory])
    assert torch.equal(out, stream)
    out.square().sum().backward()
    assert fusion.o_proj[0].weight.grad.any()


@pytest.mark.parametrize(
    ("slots", "dim"), [(1, 1), (3, 8), (8, 8), (9, 8), (16, 8), (37, 5), (4, 1), (256, 16)]
)
def test_identity_slots_are_rows_of_rotations(slots, dim):
    """Unit rows, orthogonal inside each block of `dim`; the first block is the identity."""
    rows = identity_slots(slots, dim)
    assert rows.shape == (slots, dim)
    assert torch.equal(rows[:dim], torch.eye(dim)[:slots])
    for block in rows.split(dim):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    if dim > 1:  # in one dimension there are two unit vectors
        assert len(torch.unique(rows, dim=0)) == slots


def test_identity_slots_are_the_same_every_time_and_draw_from_no_shared_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(identity_slots(20, 6), identity_slots(20, 6))
    assert torch.equal(torch.get_rng_state(), state)
