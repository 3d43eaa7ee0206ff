"""The documented blocks: usage, start, variants, and that they are the model's own block."""

import pytest
import torch
from torch import nn

from memlib import MemoryTransformerBlock, VanillaTransformerBlock
from memlib.config import ChaptersMemoryConfig
from memlib.memory import ChapterMemory
from memlib.memory.layer import LayerInput
from memlib.models import TransformerBlock

B, N, D, H, M = 2, 5, 16, 4, 6


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(module):
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter += 0.3 * random(*parameter.shape, seed=i)
    return module


def test_the_documents_example():
    block = MemoryTransformerBlock(
        hidden_dim=768, num_heads=12, has_memory=True, memory_block_variant="A", wo_init_zero=True
    )
    assert block(torch.randn(1, 3, 768), memory=torch.randn(7, 768)).shape == (1, 3, 768)


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])])
def test_a_zero_start_is_the_vanilla_block_bit_for_bit(variant, mask):
    plain = stirred(VanillaTransformerBlock(D, H).double())
    block = MemoryTransformerBlock(D, H, memory_block_variant=variant).double()
    assert block.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    x, memory = random(B, N, D), random(M, D, seed=1)
    assert torch.equal(block(x, memory, mask), plain(x, attention_mask=mask))
    open_block = MemoryTransformerBlock(D, H, memory_block_variant=variant, wo_init_zero=False).double()
    open_block.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.equal(open_block(x, memory, mask), plain(x, attention_mask=mask))


def test_without_memory_it_is_the_vanilla_block():
    plain, block = VanillaTransformerBlock(D, H).double(), MemoryTransformerBlock(D, H, False).double()
    block.load_state_dict(plain.state_dict())
    assert torch.equal(block(random(B, N, D)), plain(random(B, N, D)))


@pytest.mark.parametrize("variant", ["A", "B"])
def test_it_is_the_models_block_with_a_bank_read_whole(variant):
    config = ChaptersMemoryConfig(num_memory_tokens=M, num_heads=H, use_chapters=False)
    bank = ChapterMemory(config, D)
    own = TransformerBlock(D, H, 4 * D, {"chapters": bank}, "residual", variant).double()
    stirred(own)
    with torch.no_grad():
        own.fusion.o_proj[0].weight.copy_(torch.eye(D))
    block = MemoryTransformerBlock(D, H, memory_block_variant=variant).double()
    weights = {
        name.replace("memories.chapters.attention", "memory_attention"): value
        for name, value in own.state_dict().items()
        if not name.startswith(("fusion", "memories.chapters.bank"))
    }
    block.load_state_dict(weights)
    x, none = random(B, N, D), random(B, H, 0, D // H)
    inputs = LayerInput([bank.init_state(B)], x[:, :0], torch.ones(B, N, dtype=torch.bool), torch.zeros(B, N))
    want = own(x, none, none, None, inputs).residual
    torch.testing.assert_close(block(x, bank.bank()), want)


def test_variants_differ_and_another_is_refused():
    a, b = (stirred(MemoryTransformerBlock(D, H, memory_block_variant=v).double()) for v in "AB")
    names = [{name for name, m in block.named_modules() if isinstance(m, nn.Linear)} for block in (a, b)]
    assert names[1] - names[0] == {f"extra_mlp.{part}_proj" for part in ("gate", "up", "down")}
    with pytest.raises(ValueError, match="memory_block_variant = 'C': expected 'A' or 'B'"):
        MemoryTransformerBlock(D, H, memory_block_variant="C")


def test_no_token_sees_a_later_one():
    block = stirred(MemoryTransformerBlock(D, H, memory_block_variant="B").double())
    x, memory = random(B, N, D), random(B, M, D, seed=1)
    changed = x.clone()
    changed[:, 3:] += 1
    before, after = block(x, memory), block(changed, memory)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-12)
    assert not torch.equal(after[:, 3:], before[:, 3:])


def test_memory_where_there_is_none_is_refused():
    with pytest.raises(ValueError, match="has_memory = True: give it memory tokens"):
        MemoryTransformerBlock(D, H)(torch.zeros(B, N, D))
    with pytest.raises(ValueError, match="has_memory = False: it takes no memory"):
        VanillaTransformerBlock(D, H)(torch.zeros(B, N, D), torch.zeros(M, D))
