"""Memory cross-attention against its equation in plain loops over rows, tokens, heads and memory tokens."""

import math

import pytest
import torch

from memlib import MemoryCrossAttention

B, N, D, M, H = 2, 3, 8, 5, 2
MODES = {
    "full": {},
    "other_width": {"memory_dim": 6},
    "low_rank": {"use_low_rank_projections": True, "projection_rank": 4},
    "low_rank_other_width": {"use_low_rank_projections": True, "projection_rank": 4, "memory_dim": 6},
    "reduced": {"reduced_dim_mode": True, "memory_dim": 4},
}
modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
paths = pytest.mark.parametrize("flash", [True, False], ids=["flash", "plain"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**options):
    torch.manual_seed(0)
    return MemoryCrossAttention(D, H, **({"wo_init_zero": False} | options)).double()


def naive(layer, hidden, memory, bias=None):
    """memory: [b m e] -> [b n d] and the weights [b h n m], one number at a time."""
    k = layer.q_proj.out_features // H
    output, weights = torch.zeros(B, N, D).double(), torch.zeros(B, H, N, memory.shape[1]).double()
    for b in range(B):
        keys, values = memory[b] @ layer.k_proj.weight.T, memory[b] @ layer.v_proj.weight.T
        for n in range(N):
            query, read = layer.q_proj.weight @ hidden[b, n], []
            for h in range(H):
                part = slice(h * k, (h + 1) * k)
                score = [float(query[part] @ key[part]) / math.sqrt(k) for key in keys]
                if bias is not None:
                    score = [s + float(bias[b, min(n, bias.shape[1] - 1), m]) for m, s in enumerate(score)]
                top = max(score)
                e = [math.exp(s - top) for s in score]
                weights[b, h, n] = torch.tensor([x / sum(e) for x in e])
                read.append(sum(w * v[part] for w, v in zip(weights[b, h, n], values, strict=True)))
            output[b, n] = layer.o_proj.weight @ torch.cat(read)
    return output, weights


@modes
@paths
def test_equals_its_equation(options, flash):
    layer = attention(use_flash_attention=flash, **options)
    hidden, memory = random(B, N, D), random(M, layer.memory_dim, seed=1)
    want, weights = naive(layer, hidden, memory.expand(B, -1, -1))
    torch.testing.assert_close(layer(hidden, memory), want)
    torch.testing.assert_close(layer(hidden, memory.expand(B, -1, -1)), want)
    torch.testing.assert_close(layer.weights(hidden, memory), weights)


@paths
@pytest.mark.parametrize("decisions", [1, N])
def test_a_bias_is_added_to_the_scores(flash, decisions):
    layer, hidden, memory = attention(use_flash_attention=flash), random(B, N, D), random(B, M, D, seed=1)
    bias = random(B, decisions, M, seed=2)
    bias[1, 0, 2] = -math.inf
    torch.testing.assert_close(layer(hidden, memory, bias), naive(layer, hidden, memory, bias)[0])


@paths
def test_each_row_reads_its_own_chapters(flash):
    layer, hidden, book = attention(use_flash_attention=flash), random(B, N, D), random(4, 3, D, seed=1)
    chosen = torch.tensor([[3, 0], [1, 3]])
    bias = random(B, 1, 6, seed=2)
    memory = torch.stack([torch.cat([book[c] for c in row]) for row in chosen])
    want, weights = naive(layer, hidden, memory, bias)
    torch.testing.assert_close(layer(hidden, book, bias, chosen), want)
    torch.testing.assert_close(layer.weights(hidden, book, bias, chosen), weights)


@modes
def test_weights_sum_to_1(options):
    layer = attention(**options)
    weights = layer.weights(random(B, N, D), 9 * random(M, layer.memory_dim, seed=1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N).double())


@modes
def test_the_documents_widths(options):
    layer = attention(**options)
    inner = {"full": D, "other_width": D}.get(next(k for k, v in MODES.items() if v == options), 4)
    assert layer.q_proj.weight.shape == (inner, D) and layer.o_proj.weight.shape == (D, inner)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (inner, options.get("memory_dim", D))


def test_starts_at_exactly_nothing_and_can_leave_it():
    layer = MemoryCrossAttention(D, H).double()
    said = layer(random(B, N, D), random(M, D, seed=1))
    assert not said.any()
    said.sum().backward()
    assert layer.o_proj.weight.grad.any()


@paths
def test_recomputing_gives_the_same_gradients(flash):
    def gradients(again):
        layer = attention(use_flash_attention=flash, gradient_checkpointing=again)
        hidden, memory = random(B, N, D).requires_grad_(), random(4, 3, D, seed=1).requires_grad_()
        bias = random(B, 1, 6, seed=2).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            said = layer(hidden, memory, bias, torch.tensor([[3, 0], [1, 3]]))
        said.square().sum().backward()
        return [p.grad for p in (*layer.parameters(), hidden, memory, bias)], sum(kept)

    (plain, kept), (again, kept_again) = gradients(False), gradients(True)
    for want, got in zip(plain, again, strict=True):
        assert torch.equal(got, want)
    assert kept_again < kept


def test_gradients_are_those_of_the_function():
    layer = attention()
    hidden, memory, bias = random(B, N, D), random(4, 2, D, seed=1), random(B, 1, 4, seed=2)
    inputs = [x.requires_grad_() for x in (hidden, memory, bias)]
    chosen = torch.tensor([[3, 0], [1, 3]])
    assert torch.autograd.gradcheck(lambda h, m, s: layer(h, m, s, chosen), inputs)


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_heads = 3: must divide the inner width 8"):
        MemoryCrossAttention(8, 3)
    with pytest.raises(ValueError, match="memory has width 5: this attention reads 8"):
        attention()(random(B, N, D), random(M, 5))
