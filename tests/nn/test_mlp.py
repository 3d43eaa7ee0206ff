import torch

from memlib.nn.mlp import MLP


def test_is_swiglu_with_its_three_matrices_and_no_bias():
    mlp = MLP(6, 10).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up, down = (p.weight.T for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gated = x @ gate
    want = (gated / (1 + torch.exp(-gated)) * (x @ up)) @ down
    torch.testing.assert_close(mlp(x), want)
    assert sum(p.numel() for p in mlp.parameters()) == 3 * 6 * 10
