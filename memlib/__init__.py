"""memlib: a notebook-first lab for memory-augmented transformers.

Names are imported when first used, so `import memlib` is fast and does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "memlib.config": [
        "ChaptersMemoryConfig",
        "Config",
        "ConfigError",
        "ExternalMemoryConfig",
        "InternalMemoryConfig",
        "MemoryConfig",
        "ModelConfig",
        "TaskConfig",
        "TrainingConfig",
        "get_memory_bank_assignments",
        "get_memory_layer_indices",
        "load_config",
        "override",
        "save_config",
    ],
    "memlib.memory": ["MEMORIES", "ChapterMemory", "ExternalMemory", "InternalMemory", "Memory", "State"],
    "memlib.memory.chapters.attention": ["MemoryCrossAttention"],
    "memlib.memory.chapters.banks": [
        "ChapteredMemoryBank",
        "FactorizedMemoryBank",
        "MemoryBank",
        "ReducedDimMemoryBank",
        "StandardMemoryBank",
        "create_memory_bank",
    ],
    "memlib.memory.chapters.quantization": [
        "QuantizedMemoryBank",
        "dequantize_memory_bank",
        "pack_memory_banks",
        "quantize_memory_bank",
    ],
    "memlib.memory.chapters.routers": [
        "ChapterRouter",
        "HybridRouter",
        "RollingRouter",
        "RouterLossOptions",
        "TokenLevelRouter",
        "router_losses",
    ],
    "memlib.models": [
        "MemoryState",
        "MemoryTransformer",
        "MemoryTransformerBlock",
        "ModelOutput",
        "VanillaTransformerBlock",
    ],
    "memlib.models.info": [
        "count_parameters",
        "format_params",
        "get_model_size_mb",
        "print_model_info",
    ],
    "memlib.nn.attention": ["SelfAttention"],
    "memlib.nn.mlp": ["MLP"],
    "memlib.nn.norm": ["RMSNorm"],
    "memlib.nn.rotary": ["RotaryPositionalEmbedding"],
    "memlib.pretrained.adapter": ["MemoryAdapter"],
    "memlib.pretrained.lora": [
        "LoRALinear",
        "apply_lora_to_model",
        "get_lora_parameters",
        "merge_lora_weights",
        "unmerge_lora_weights",
    ],
    "memlib.pretrained.weights": ["load_base"],
    "memlib.tasks": ["TASKS", "make_task"],
    "memlib.training.checkpoint": ["load_checkpoint", "save_checkpoint", "set_seed"],
    "memlib.training.optimizer": ["get_cosine_schedule", "get_linear_schedule"],
    "memlib.training.trainer": ["Trainer", "load_model", "load_run"],
    "memlib.evaluation": ["evaluate"],
    "memlib.inference": [
        "Generation",
        "GenerationConfig",
        "Sessions",
        "TokenStream",
        "export_model",
        "generate",
        "load_state",
        "save_state",
        "stream",
        "tokenizer_for",
    ],
    "memlib.lab.trace": ["Trace", "record"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'memlib' has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"memlib.{name} needs transformers: `make extras` installs it") from None


def __dir__() -> list[str]:
    return __all__
