"""Parameter counts and sizes of a model, formatted for people."""

from __future__ import annotations

from torch import nn

from memlib.config import Config, get_memory_bank_assignments, get_memory_kinds


def count_parameters(model: nn.Module, trainable_only: bool = True) -> int:
    """Number of (trainable) parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def format_params(count: int) -> str:
    """1234 -> "1.2K", 350_000_000 -> "350M", 1_200_000_000 -> "1.2B"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.99995 * size:  # 999_999 is 1M, not 1000K
            figure = f"{count / size:.1f}"
            return figure.removesuffix(".0") + unit
    return str(count)


def get_model_size_mb(model: nn.Module) -> float:
    """Bytes of parameters and buffers, in MiB."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def print_model_info(model: nn.Module, config: Config) -> None:
    """Print the model's diagram in a few lines: layers, memories, banks, size."""
    banks, kinds = get_memory_bank_assignments(config), get_memory_kinds(config)
    print(
        f"{config.model.num_layers} layers, width {config.model.hidden_dim}, "
        f"{config.model.num_heads} heads, window {config.model.segment_length} tokens"
    )
    for layer in range(config.model.num_layers):
        here = kinds.get(layer)
        memory = f"{' + '.join(here)}, bank {banks[layer]}" if here else "no memory"
        print(f"  layer {layer}: {memory}")
    print(f"{format_params(count_parameters(model))} parameters, {get_model_size_mb(model):.2f} MiB")
