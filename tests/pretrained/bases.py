"""Tiny pretrained models with random weights, one of each supported family, and adapters around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from einops import einsum
from torch import nn

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

import transformers

from memlib.config import AdapterConfig, Config, MemoryConfig, ModelConfig
from memlib.pretrained.adapter import MemoryAdapter

from ..laws.cases import SEGMENT, VOCAB, Case, memory_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # Llama 2 and 3, Mistral, Qwen 2.5 and 3
HIDDEN, LAYERS = 16, 3


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64, vocab: int = VOCAB) -> Any:
    """A model of that family with grouped-query attention, always of the same random weights."""
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=512,
        initializer_range=0.2,  # so that attention differs from token to token
        pad_token_id=None,  # its embedding would be zero, without a gradient
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


class Rotary64(nn.Module):
    """Rotary angles in float64: transformers takes them in float32, also in float64 models."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.inv_freq = rotary.inv_freq.double()

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = einsum(position_ids.double(), self.inv_freq, "b n, k -> b n k")
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


@dataclass(frozen=True, eq=False)
class AdapterCase(Case):
    """A tiny pretrained model with memories, for the laws."""

    family: str = "llama"
    exact_rotary: bool = True
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
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = tiny(self.family, self.dtype)
            if self.exact_rotary:
                base.model.rotary_emb = Rotary64(base.model.rotary_emb)
            return MemoryAdapter(self.config(**memory), base).to(self.dtype).eval()

    def build(self) -> Any:
        """The adapter with every weight that it added moved off its start; the base as it is."""
        from ..laws.cases import stir

        model = self.fresh()
        stir(model.branches)
        return model
