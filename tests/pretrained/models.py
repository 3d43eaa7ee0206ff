"""Tiny models for tests of adapters: random pretrained families, memlib's own, and PEFT's LoRA on them."""

import torch

from memlib.config import Config, override
from memlib.models import MemoryTransformer
from memlib.pretrained.lora import lora_layers

VOCAB = 31
FAMILIES = ("Llama", "Qwen2", "Mistral")
MEMLIB = {
    "model.hidden_dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.intermediate_dim": 24,
    "model.vocab_size": VOCAB,
    "model.segment_length": 4,
    "memory.kinds": ["internal"],
    "memory.internal.num_slots": 4,
    "memory.internal.num_heads": 2,
}


def build(family, peer, dtype=torch.float64, seed=0, **options):
    """A tiny model with random weights, in eval mode: "memlib" or a family of transformers."""
    torch.manual_seed(seed)
    if family == "memlib":
        return MemoryTransformer(override(Config(), MEMLIB)).to(dtype).eval()
    hf = peer("transformers")
    config = getattr(hf, f"{family}Config")(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        **options,
    )
    return getattr(hf, f"{family}ForCausalLM")(config).to(dtype).eval()


def ids(rows=2, tokens=9):
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


@torch.no_grad()
def stir(model, seed=1):
    """Move A and B off their start: with B = 0 nothing would show."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for part in (layer.lora_A.weight, layer.lora_B.weight):
            part += 0.2 * torch.randn(part.shape, generator=generator, dtype=part.dtype)
    return model


def with_peft(model, peer, config=None, **options):
    """PEFT's LoRA in a model, in place, with random A and B; the names of its layers and their modules."""
    peft = peer("peft")
    config = config or peft.LoraConfig(init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, model)
    model.eval()
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


@torch.no_grad()
def copy_weights(peft_layers, model):
    """Give memlib's LoRA the weights of PEFT's."""
    ours = lora_layers(model)
    assert ours.keys() == peft_layers.keys()
    for name, theirs in peft_layers.items():
        ours[name].lora_A.weight.copy_(theirs.lora_A["default"].weight)
        ours[name].lora_B.weight.copy_(theirs.lora_B["default"].weight)
