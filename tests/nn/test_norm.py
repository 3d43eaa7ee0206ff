import pytest
import torch

from memlib.nn.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchs_rms_norm_with_gradients(dtype):
    torch.manual_seed(0)
    mine, theirs = RMSNorm(12, eps=1e-5).to(dtype), torch.nn.RMSNorm(12, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        mine.weight.copy_(torch.randn(12))
        theirs.weight.copy_(mine.weight)
    x, y = (torch.linspace(-3, 5, 60, dtype=dtype).reshape(5, 12).requires_grad_() for _ in range(2))
    torch.testing.assert_close(mine(x), theirs(y))
    mine(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(mine.weight.grad, theirs.weight.grad)


def test_half_precision_keeps_its_statistics_in_float32():
    """300² overflows float16; the mean of squares must not."""
    x = torch.full((2, 8), 300.0, dtype=torch.float16)
    out = RMSNorm(8).half()(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones_like(x))


def test_a_zero_vector_stays_zero():
    assert torch.equal(RMSNorm(4)(torch.zeros(3, 4)), torch.zeros(3, 4))
