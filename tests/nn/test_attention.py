import math

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

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


# ----------------------------------------------------------------------------------------- sliding window


def by_masked_sdpa(attention, x, reach):
    """torch's attention with the window as an explicit mask, keys and queries at their positions."""
    q, k, v = attention.project(x)
    if attention.rotary is not None:
        q, k = attention.rotary(q), attention.rotary(k)
    places = torch.arange(x.shape[1])
    behind = places[:, None] - places
    mixed = F.scaled_dot_product_attention(q, k, v, (behind >= 0) & (behind < reach))
    return attention.output(mixed)


def with_gradients(run, attention, x):
    """The output, and the gradients of input and weights."""
    x = x.clone().requires_grad_()
    output = run(attention, x)
    leaves = [x, *attention.parameters()]
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    return output, *torch.autograd.grad(output, leaves, noise)


@pytest.mark.parametrize("tokens", [N, 150])
@pytest.mark.parametrize("reach", [1, 3, 5, 70])
def test_a_sliding_window_is_torchs_attention_with_that_mask(attention, reach, tokens):
    """In float64 and float32, with gradients; a window that is off by one is not."""
    x = torch.randn(B, tokens, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        attention.to(dtype).reach = reach
        none = (torch.zeros(B, H, 0, D // H, dtype=dtype),) * 2
        got = with_gradients(lambda a, x: a(x, *none, None)[0], attention, x.to(dtype))  # noqa: B023
        want = with_gradients(lambda a, x: by_masked_sdpa(a, x, reach), attention, x.to(dtype))
        torch.testing.assert_close(got, want, rtol=close, atol=close)
    for wrong in (reach - 1, reach + 1):
        if wrong > 0 and min(reach, wrong) < tokens:
            other = with_gradients(lambda a, x: by_masked_sdpa(a, x, wrong), attention, x.float())  # noqa: B023
            with pytest.raises(AssertionError):
                torch.testing.assert_close(got, other, rtol=close, atol=close)


@pytest.mark.parametrize("pieces", [(2, 4), (5, 1), (1,) * N])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_sliding_window_in_pieces_with_padding_equals_the_whole(attention, pieces, padded):
    attention.reach = 2
    x, (keys, values) = hidden(), empty()
    valid = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]]).bool() if padded else None
    want, *_ = attention(x, *empty(), window_mask(N, valid, 0, x.device))
    got = []
    for piece in x.split(pieces, 1):
        past, n = keys.shape[2], piece.shape[1]
        seen = None if valid is None else valid[:, : past + n]
        out, keys, values = attention(piece, keys, values, window_mask(n, seen, past, x.device))
        got.append(out)
    torch.testing.assert_close(torch.cat(got, 1), want)
    attention.reach = 3
    other, *_ = attention(x, *empty(), window_mask(N, valid, 0, x.device))
    assert not torch.allclose(other, want)


@torch.no_grad()
def test_a_window_of_all_tokens_is_no_window(attention):
    x, want = hidden(), attention(hidden(), *empty(), None)[0]
    attention.reach = N
    assert torch.equal(attention(x, *empty(), None)[0], want)
