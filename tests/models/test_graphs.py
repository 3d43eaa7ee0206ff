"""A segment's step as a graph: compiled in one piece, exported, and equal to the plain call.

FAISS stores are the one exception: their search runs outside torch. Each variant is traced with one layer;
the baseline and all memories together, with two, show how layers are joined.
"""

import pytest
import torch
from torch import nn

from memlib.config import override
from memlib.memory import MEMORIES
from memlib.memory.layer import LayerInput
from memlib.models import MemoryTransformer
from tests.laws.cases import BATCH, SEGMENT, VOCAB, cases, stir

VARIANTS = [case for case in cases() if case.name.endswith("per_layer") or not case.kinds]
ALONE = [case for case in VARIANTS if len(case.kinds) == 1]
TWO_OF_EACH = [
    case
    for kind in MEMORIES
    for own in [[case for case in ALONE if kind in case.kinds]]
    for case in dict.fromkeys((own[0], own[-1]))
]


class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, state):
        return self.model.step(ids, None, state)


def build(case):
    layers = 1 if len(case.kinds) == 1 else 2
    return stir(MemoryTransformer(override(case.config(), {"model.num_layers": layers})).double().eval())


def ids(tokens, seed=0):
    return torch.randint(VOCAB, (BATCH, tokens), generator=torch.Generator().manual_seed(seed))


def same(got, want):
    got, want = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", VARIANTS, ids=str)
@torch.no_grad()
def test_a_steps_export_takes_and_gives_the_memory_state(case):
    model = build(case)
    state = model(ids(2 * SEGMENT)).memory_state
    exported = torch.export.export(Step(model), (ids(SEGMENT), state)).module()
    for seed in (1, 2):
        same(exported(ids(SEGMENT, seed), state), model.step(ids(SEGMENT, seed), None, state))
        state = model(ids(SEGMENT, seed), memory_state=state).memory_state


@pytest.mark.slow
@pytest.mark.parametrize("case", [VARIANTS[0], *TWO_OF_EACH], ids=str)
def test_a_block_compiles_in_one_piece_with_its_gradients(case):
    """Read and write of a complete segment, with padding, from a state that is not empty."""
    torch._dynamo.reset()
    model, mask = build(case), torch.ones(BATCH, SEGMENT, dtype=torch.bool)
    mask[1, -1], mask[2] = False, False
    state = model(ids(2 * SEGMENT)).memory_state.detach()
    block, none = model.block(0), state.window.keys[0]
    memory = None
    if model.stack.layers:
        states = model.stack.at(0, state.memories)
        hidden = state.window.hidden[0]
        memory = LayerInput(states, hidden, mask, ids(SEGMENT), states, mask.any(1))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    results = []
    for run in (block, compiled):
        residual = torch.randn(BATCH, SEGMENT, 16, dtype=torch.float64, generator=torch.manual_seed(0))
        residual.requires_grad_()
        output = run(residual, none, none, None, memory)
        leaves = [
            t for t in torch.utils._pytree.tree_leaves(output) if t is not None and t.is_floating_point()
        ]
        loss = sum(leaf.square().sum() for leaf in leaves)
        gradients = torch.autograd.grad(loss, [residual, *trained], allow_unused=True)
        results.append((output, [g for g in gradients if g is not None]))
    same(results[1], results[0])


@torch.no_grad()
def test_a_branch_on_a_tensors_values_is_caught():
    class Branches(Step):
        def forward(self, ids, state):
            return super().forward(ids if int(ids.min()) >= 0 else -ids, state)

    model = build(VARIANTS[0])
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Branches(model), (ids(SEGMENT), model.init_state(BATCH)))
