import pytest
import torch

from memlib.nn.rotary import RotaryPositionalEmbedding


@pytest.fixture
def rotary():
    return RotaryPositionalEmbedding(8).double()


def heads(n, seed=0):
    """[b h n k]."""
    return torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_multiplication_by_a_unit_complex_number(rotary):
    """Feature i and i + k/2 are the real and the imaginary part, turned by p * base^(-2i / k)."""
    x = heads(6)
    number = torch.complex(x[..., :4], x[..., 4:])
    frequency = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angle = torch.outer(torch.arange(6, dtype=torch.float64), frequency)
    turned = number * torch.polar(torch.ones_like(angle), angle)
    want = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotary(x), want, atol=1e-6, rtol=0)


def test_scores_depend_on_the_distance_only(rotary):
    q, k = heads(1, seed=1), heads(1, seed=2)

    def score(query_at, key_at):
        return (rotary(q, query_at) * rotary(k, key_at)).sum(-1)

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-6, rtol=0)
    assert not torch.allclose(score(7, 3), score(7, 4))


def test_lengths_are_kept_and_position_zero_is_the_identity(rotary):
    x = heads(5)
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotary(x)[:, :, 0], x[:, :, 0])


def test_later_tokens_alone_are_turned_as_in_the_whole(rotary):
    x = heads(9)
    assert torch.equal(rotary(x[:, :, 4:], first=4), rotary(x)[:, :, 4:])


def test_an_odd_head_width_is_refused():
    with pytest.raises(ValueError, match=r"head_dim = 7: .* even"):
        RotaryPositionalEmbedding(7)
