"""Whether a configuration fits a pretrained model, and what it takes from it: sizes and the model itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from memlib.config import Config, ConfigError, check_sizes, override
from memlib.memory import MEMORIES
from memlib.pretrained.families import decoder_layers
from memlib.pretrained.saved_module import SavedModule


def load_named(config: Config) -> Any:
    """The base that a configuration names."""
    return load_with_tokenizer(config)[0]


def load_with_tokenizer(config: Config, download: bool = False) -> tuple[Any, Any]:
    """The base that a configuration names, and its tokenizer with the configured chat template, if any.

    download: allow a hub model to be fetched.
    """
    from memlib.pretrained.weights import load_base

    options = config.adapter
    if options.base_model_name is None:
        raise ConfigError(
            "adapter.base_model_name = null: name a pretrained model, or call MemoryAdapter(config, base)"
        )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.base_dtype]
    base, tokenizer = load_base(options.base_model_name, dtype, download=download)
    return base, with_chat_template(tokenizer, config)


def with_chat_template(tokenizer: Any, config: Config) -> Any:
    """The tokenizer with `task.instructions.chat_template`, if that is set."""
    template = config.task.instructions.chat_template
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def refuse_base(base: Any) -> None:
    """Raise ValueError for a base that has an adapter, or that keeps more than keys and values."""
    hooks = [getattr(hook, "__self__", None) for hook in base._forward_pre_hooks.values()]
    if any(isinstance(owner, SavedModule) for owner in hooks):
        raise ValueError("this base has an adapter already: call its detach() first, or load the base again")
    kinds = {type(layer) for layer in DynamicCache(config=base.config).layers}
    if other := sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}):
        raise ValueError(
            f"base model of type {base.config.model_type!r} caches {', '.join(other)}: a memory state "
            "carries keys and values only; choose a base with softmax attention in every layer"
        )


def resolve(config: Config, base: Any, num_layers: int) -> Config:
    """The configuration with the base's sizes, checked; ConfigError names what cannot work and why."""
    options, memory = config.adapter, config.memory
    if options.memory and memory.kinds:
        if memory.fusion != "residual":
            raise ConfigError(
                "memory.fusion = 'softmax': a pretrained layer's attention has no gating network that could "
                "weigh memories against it without changing the base; set memory.fusion: residual"
            )
        if memory.memory_block_variant == "B":
            raise ConfigError(
                "memory.memory_block_variant = 'B': a hook stands after a layer, not before its MLP; set "
                "memory.memory_block_variant: A"
            )
        sharing = [kind for kind in memory.kinds if MEMORIES[kind].shares_state]
        if options.mode == "full" and memory.memory_sharing != "per_layer" and sharing:
            raise ConfigError(
                f"memory.memory_sharing = {memory.memory_sharing!r}: in one forward pass over several "
                f"segments a layer reads {sharing[0]} before later layers have written the segment before; "
                "set memory.memory_sharing: per_layer or adapter.mode: segment"
            )
    sizes = {
        "model.hidden_dim": options.width or base.config.hidden_size,
        "model.num_heads": 1,
        "model.num_layers": num_layers,
        "model.vocab_size": base.get_input_embeddings().num_embeddings,
        "model.use_rope": False,
        "adapter.base_model_name": options.base_model_name or base.config.name_or_path or "a base model",
    }
    resolved = override(config, sizes)
    try:
        check_sizes(resolved)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.hidden_dim", "adapter.width")) from None
    return resolved


@torch.no_grad()
def stream_sizes(base: Any, layers: Any) -> dict[int, float]:
    """The median RMS of the residual stream's tokens after each of these layers, on ids from all over the
    vocabulary; 1 for a base without values (on the meta device).

    The median, because first tokens can be a hundred times larger than all others (attention sinks).
    """
    if not layers or base.device.type == "meta":
        return dict.fromkeys(layers, 1.0)
    sizes: dict[int, float] = {}

    def measure(layer: int, _module: Any, _args: Any, output: Any) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        sizes[layer] = float(stream.float().pow(2).mean(-1).sqrt().median())

    found = decoder_layers(base)
    handles = [found[layer].register_forward_hook(partial(measure, layer)) for layer in layers]
    last = base.get_input_embeddings().num_embeddings - 1
    base(torch.linspace(0, last, min(128, last), device=base.device).long()[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return sizes
