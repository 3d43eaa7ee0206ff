"""Keys and memory attention against their equations in plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from memlib.memory.key_attention import MemoryAttention, TokenKey
from memlib.ops import softmax_or_zero

B, N, D, S, K, E = 2, 4, 6, 7, 4, 3
SHARPNESS = 1.5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts():
    """query [b n k], keys [b s k], values [b s e]."""
    return random(B, N, K, seed=1), random(B, S, K, seed=2), random(B, S, E, seed=3)


def attention(top_k=None):
    return MemoryAttention(SHARPNESS, "weight", top_k).double()


def naive(query, keys, values, bias, top_k):
    """Token by token and place by place, reading the top_k best only."""
    out = torch.zeros(B, N, E, dtype=torch.float64)
    for b in range(B):
        for t in range(N):
            score = {
                s: SHARPNESS * math.sqrt(K) * float(query[b, t] @ keys[b, s]) + float(bias[b, s])
                for s in range(S)
                if bias[b, s] > -math.inf
            }
            best = sorted(score, key=score.get, reverse=True)[:top_k]
            total = sum(math.exp(score[s]) for s in best)
            for s in best:
                out[b, t] += math.exp(score[s]) / total * values[b, s]
    return out


@pytest.mark.parametrize("top_k", [None, 1, 3, S, S + 1])
@pytest.mark.parametrize("shut", [[], [0, 4], list(range(S))], ids=["all", "some", "none"])
@torch.no_grad()
def test_attention_is_its_equation_token_by_token(top_k, shut):
    bias = random(B, S, seed=4)
    bias[:, shut] = -math.inf
    torch.testing.assert_close(attention(top_k)(*parts(), bias), naive(*parts(), bias, top_k))


@pytest.mark.parametrize("top_k", [None, 3])
def test_weights_are_heard_over_all_places_and_sum_to_one(top_k):
    built, heard = attention(top_k), []
    built.weight_point.listeners.append(heard.append)
    read = built(*parts())
    torch.testing.assert_close(heard[0].sum(-1), torch.ones(B, N, dtype=torch.float64))
    torch.testing.assert_close(heard[0] @ parts()[2], read)
    assert ((heard[0] > 0).sum(-1) == (top_k or S)).all()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("shut", [[], [0, 4], list(range(S))], ids=["all", "some", "none"])
def test_attention_has_the_gradient_of_its_values(top_k, shut):
    bias = random(B, S, seed=4)
    bias[:, shut] = -math.inf
    inputs = [part.requires_grad_() for part in parts()]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(top_k)(q, k, v, bias), inputs)


def test_what_was_used_is_the_largest_weight_of_tokens_that_count():
    query, keys, _ = parts()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    used = attention().used(query, keys, None, mask)
    weight = F.softmax(SHARPNESS * math.sqrt(K) * query @ keys.transpose(1, 2), -1)
    torch.testing.assert_close(used[0], weight[0, [0, 1, 3]].amax(0))
    assert not used[1].any()


def test_softmax_or_zero_has_no_nan():
    score = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf], [1e30, 1e30]], requires_grad=True)
    weight = softmax_or_zero(score)
    assert torch.equal(weight, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]))
    weight[:, 0].sum().backward()
    assert torch.isfinite(score.grad).all()


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_a_token_is_filed_under_the_token_before_it(shift):
    key, hidden = TokenKey(D, K, shift).double(), random(B, N, D)
    before = torch.cat((torch.zeros(B, 1, D, dtype=torch.float64), hidden[:, :-1]), 1)
    torch.testing.assert_close(key.key(hidden), key.query(shift * before + (1 - shift) * hidden))
    norms = key.query(hidden).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
