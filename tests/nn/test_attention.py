import math

import pytest
import torch
from einops import rearrange
from torch import nn

from memlib.nn.attention import SelfAttention, window_mask

B, N, D, H = 2, 6, 8, 2


@pytest.fixture(params=[True, False], ids=["rope", "no_rope"])
def attention(request):
    torch.manual_seed(0)
    return SelfAttention(D, H, use_rope=request.param).double()


def hidden(seed=1):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def empty(batch=B):
    """No past: keys and values [b h 0 k]."""
    return (torch.zeros(batch, H, 0, D // H, dtype=torch.float64),) * 2


def naive(attention, x, valid):
    """Attention in plain loops: [b n d], of tokens that are valid (or the token itself)."""
    q, k, v = (
        rearrange(p(x), "b n (h k) -> b h n k", h=H)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if attention.rotary is not None:
        q, k = attention.rotary(q), attention.rotary(k)
    out = torch.zeros(B, H, N, D // H, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(N):
                seen = [u for u in range(t + 1) if valid[b, u] or u == t]
                score = [math.exp(q[b, h, t] @ k[b, h, u] / math.sqrt(D // H)) for u in seen]
                out[b, h, t] = sum(s * v[b, h, u] for s, u in zip(score, seen, strict=True)) / sum(score)
    return attention.o_proj(rearrange(out, "b h n k -> b n (h k)"))


@torch.no_grad()
def test_equals_attention_in_plain_loops(attention):
    x, everything = hidden(), torch.ones(B, N, dtype=torch.bool)
    got, keys, values = attention(x, *empty(), None)
    torch.testing.assert_close(got, naive(attention, x, everything))
    assert keys.shape == values.shape == (B, H, N, D // H)


@torch.no_grad()
def test_equals_the_loops_with_padding(attention):
    x = hidden()
    valid = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]]).bool()
    got, *_ = attention(x, *empty(), window_mask(N, valid, 0, x.device))
    torch.testing.assert_close(got, naive(attention, x, valid))


@torch.no_grad()
def test_equals_torchs_multi_head_attention():
    mine = SelfAttention(D, H, use_rope=False).double()
    theirs = nn.MultiheadAttention(D, H, bias=False, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.copy_(torch.cat((mine.q_proj.weight, mine.k_proj.weight, mine.v_proj.weight)))
    theirs.out_proj.weight.copy_(mine.o_proj.weight)
    future = torch.ones(N, N).triu(1).bool()
    want, _ = theirs(hidden(), hidden(), hidden(), attn_mask=future)
    torch.testing.assert_close(mine(hidden(), *empty(), None)[0], want)


@pytest.mark.parametrize("pieces", [(2, 4), (5, 1), (1,) * N])
@torch.no_grad()
def test_pieces_with_their_past_equal_the_whole(attention, pieces):
    x = hidden()
    want, want_keys, want_values = attention(x, *empty(), None)
    keys, values = empty()
    got = []
    for piece in x.split(pieces, 1):
        mask = window_mask(piece.shape[1], None, keys.shape[2], x.device)
        out, keys, values = attention(piece, keys, values, mask)
        got.append(out)
    torch.testing.assert_close(torch.cat(got, 1), want)
    torch.testing.assert_close((keys, values), (want_keys, want_values))


@pytest.mark.parametrize("past", [0, 1, 4])
def test_window_mask_is_causal_and_hides_padding_but_never_the_token_itself(past):
    valid = torch.tensor([[1] * (past + 3), [0] * (past + 2) + [1]]).bool()
    mask = window_mask(3, valid, past, valid.device)
    for b in range(2):
        for t in range(3):
            for u in range(past + 3):
                may = u <= past + t and (bool(valid[b, u]) or u == past + t)
                assert bool(mask[b, 0, t, u]) == may


def test_without_past_and_padding_no_mask_is_made():
    assert window_mask(4, None, 0, torch.device("cpu")) is None


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads = 3: must divide hidden_dim = 8"):
        SelfAttention(8, 3)
