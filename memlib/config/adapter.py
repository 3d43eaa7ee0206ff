"""Options of what is added to a pretrained model: memories, LoRA, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlib.config.fields import option


@dataclass(kw_only=True)
class AdapterConfig:
    """A pretrained model with memories after some layers, with LoRA in its linear maps, or with both.

    The memories, their layers and their sizes are those of the group `memory`; the group `model` gives the
    segment length only. Source: "Implementation Plan" and "Core Package", see docs/coverage.md.
    """

    base_model_name: str | None = option(
        None, "the pretrained model: smollm2-135m-instruct, a local folder or a hub name; null: none"
    )
    base_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "type in which a named base is loaded; memory branches are float32 in any case"
    )
    freeze_base_model: bool = option(True, "train only what is added to the pretrained model")

    use_memory_adapter: bool = option(True, "add the memories of memory.kinds")
    use_lora: bool = option(False, "add LoRA to the linear maps of lora_targets")
    use_both_memory_and_lora: bool = option(False, "add both, whatever the two fields above say")
    width: int | None = option(
        64, "width w of a memory branch: hidden_dim of its memories; null: the base's, without projections", 1
    )
    mode: Literal["full", "segment"] = option(
        "full",
        "full: the base attends to all tokens that it has seen, and its cache grows; segment: the base "
        "attends inside a segment only, and the state has a fixed size",
    )
    gate: Literal["token", "none"] = option(
        "token", "token: sigma(h W_g + b_g) for each token and memory; none: always read in full"
    )
    gate_init: float = option(0.0, "initial bias of the gates")
    gate_cost: float = option(
        0.0, "training adds this x mean gate to the loss: the price of reading a memory", 0.0
    )
    scale: float | None = option(
        None,
        "factor of what a branch adds; null: the residual stream's size (median RMS of its tokens) at that "
        "layer, measured once when the adapter is built",
        0.0,
    )
    lora_rank: int = option(16, "rank r of the LoRA matrices", 1)
    lora_alpha: float = option(32.0, "LoRA's scale is lora_alpha / r", 0.0)
    lora_targets: list[str] = option(
        ["q_proj", "v_proj"], "names of the linear maps with LoRA; [all-linear]: all but the output layer"
    )
    lora_dropout: float = option(0.0, "dropout on LoRA's input", 0.0, 0.99)
    use_rslora: bool = option(False, "LoRA's scale is lora_alpha / sqrt(r) (rsLoRA)")

    lora_rank_pattern: dict[str, int] = option({}, "other ranks for some layers, by a pattern of their names")
    lora_alpha_pattern: dict[str, float] = option({}, "other alphas for some layers, in the same way")

    @property
    def memory(self) -> bool:
        """Whether memories are added."""
        return self.use_memory_adapter or self.use_both_memory_and_lora

    @property
    def lora(self) -> bool:
        """Whether LoRA is added."""
        return self.use_lora or self.use_both_memory_and_lora
