"""Tiny models for tests of what is added to pretrained ones: of each supported family with random weights,
memlib's own, adapters around them, and PEFT's LoRA in them. transformers is imported where it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from memlib.config import AdapterConfig, Config, MemoryConfig, ModelConfig, override
from memlib.models import MemoryTransformer
from memlib.pretrained.lora import lora_layers

from ..laws import cases
from ..laws.cases import SEGMENT, VOCAB, Case, memory_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # Llama 2 and 3, Mistral, Qwen 2.5 and 3
HIDDEN, LAYERS = 16, 3
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


def tiny(
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    vocab: int = VOCAB,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A model of that family with grouped-query attention, in eval mode, always of the same random weights.

    options: more of the family's configuration.
    """
    import transformers

    sizes = {
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # so that attention differs from token to token
        "pad_token_id": None,  # its embedding would be zero, without a gradient
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(family, **sizes | options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def build(family: str, peer: Any, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """A tiny model with random weights, in eval mode: "memlib" or a family of transformers.

    Random numbers start anew, so that LoRA added next has the same weights each time.
    """
    torch.manual_seed(seed)
    if family == "memlib":
        return MemoryTransformer(override(Config(), MEMLIB)).to(dtype).eval()
    peer("transformers")
    return tiny(family, dtype, seed=seed, **options)


@dataclass(frozen=True, eq=False)
class AdapterCase(Case):
    """A tiny pretrained model with memories, for the laws."""

    family: str = "llama"
    adapter: tuple[tuple[str, Any], ...] = ()

    def config(self, **memory: Any) -> Config:
        parts = {kind: memory_config(kind)(**options) for kind, options in self.kinds.items()}
        options = {"fusion": "residual", **self.memory, **memory}
        return Config(
            model=ModelConfig(segment_length=SEGMENT),
            memory=MemoryConfig(kinds=list(self.kinds), **parts, **options),
            adapter=AdapterConfig(
                base_model_name=self.family, width=8, freeze_base_model=False, **dict(self.adapter)
            ),
        )

    def fresh(self, **memory: Any) -> Any:
        from memlib.pretrained.adapter import MemoryAdapter

        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MemoryAdapter(self.config(**memory), tiny(self.family, self.dtype)).to(self.dtype).eval()

    def build(self) -> Any:
        """The adapter with every weight that it added moved off its start; the base as it is."""
        model = self.fresh()
        cases.stir(model.branches)
        return model


def adapter(
    family: str = "llama",
    kinds: tuple[str, ...] = ("internal", "external"),
    *,
    base: Any = None,
    dtype: torch.dtype = torch.float64,
    stirred: bool = True,
    seed: int = 1,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """An adapter in eval mode, of the same weights for a seed, with what it added moved off its start.

    settings: fields of `AdapterConfig`; options: other fields of the configuration, by path. With a base the
    branches are float32, or float64 with a float64 base.
    """
    from memlib.pretrained.adapter import MemoryAdapter

    fused = {
        kind: next(one for one in cases.variants(kind) if not memory_config(kind)(**one).in_attention)
        for kind in kinds
    }
    case = AdapterCase(family, {}, fused, family=family)
    changes = {f"adapter.{name}": value for name, value in settings.items()}
    config = override(case.config(), {"adapter.freeze_base_model": True} | changes | (options or {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = tiny(family, dtype) if base is None else base
        model = MemoryAdapter(config, base).eval()
    model.branches.to(torch.promote_types(base.dtype, torch.float32))
    if stirred:
        cases.stir(model.branches, seed=seed)
        if config.adapter.lora:
            stir_lora(model, seed)
    return model


# -------------------------------------------------------------------------------------------------- data

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BYTES = 257  # values, with the token that ends a text


def byte_tokenizer(template: str | None = CHAT) -> Any:
    """Bytes, with a token that ends documents and messages."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", chat_template=template
    )


# -------------------------------------------------------------------------------------------- LoRA and PEFT


def ids(rows: int = 2, tokens: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids: [rows tokens]."""
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


@torch.no_grad()
def stir_lora(model: Any, seed: int = 1) -> Any:
    """Move A and B off their start: with B = 0 nothing would show."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for part in (layer.lora_A.weight, layer.lora_B.weight):
            part += 0.2 * torch.randn(part.shape, generator=generator, dtype=part.dtype)
    return model


def with_peft(model: Any, peer: Any, config: Any = None, **options: Any) -> dict[str, Any]:
    """PEFT's LoRA in a model, in place, with random A and B; the names of its layers and their modules."""
    peft = peer("peft")
    config = config or peft.LoraConfig(init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, model)
    model.eval()
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


@torch.no_grad()
def copy_weights(peft_layers: dict[str, Any], model: Any) -> None:
    """Give memlib's LoRA the weights of PEFT's."""
    ours = lora_layers(model)
    assert ours.keys() == peft_layers.keys()
    for name, theirs in peft_layers.items():
        ours[name].lora_A.weight.copy_(theirs.lora_A["default"].weight)
        ours[name].lora_B.weight.copy_(theirs.lora_B["default"].weight)
