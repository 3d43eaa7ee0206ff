"""A whole model by Triton kernels, interpreted, and by torch: in float64 the same logits and gradients."""

from __future__ import annotations

import torch

from memlib_kernels.interpreter import interpreted
from tests.laws.cases import SEGMENT, VOCAB, cases


def test_a_model_with_every_memory_computes_the_same_by_kernels():
    model = next(case for case in cases() if case.name.startswith("all")).build().train()
    tokens = torch.randint(0, VOCAB, (2, 2 * SEGMENT), generator=torch.Generator().manual_seed(0))

    def run():
        model.zero_grad()
        torch.manual_seed(0)
        outputs = model(tokens, labels=tokens)
        outputs.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return outputs.logits.detach(), {name: grad.clone() for name, grad in grads.items()}

    logits, grads = run()
    with interpreted() as record:
        found, found_grads = run()
    used = {name for name, _ in record.launches}
    for kernel in ("norm", "silu_mul", "gated_write", "addressed_weights"):
        assert {f"{kernel}_forward"} < used, kernel
    torch.testing.assert_close(found, logits, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found_grads, grads, atol=1e-12, rtol=1e-12)
