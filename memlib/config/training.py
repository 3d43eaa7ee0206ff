"""Options of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from memlib.config.fields import option


@dataclass(kw_only=True)
class Stage:
    """One stage of the curriculum: task fields that change at a training step."""

    from_step: int = option(0, "first step of the stage", 0)
    set: dict[str, Any] = option({}, "task fields by path, e.g. {segments: 2, recall.num_pairs: 1}")


@dataclass(kw_only=True)
class TrainingConfig:
    """Optimizer, schedule, evaluation and checkpoints."""

    training_mode: Literal["pretraining", "instruction_finetuning", "facts", "comparison"] = option(
        "pretraining",
        "what a pretrained base (adapter.base_model_name) is trained on. pretraining: task.documents; "
        "instruction_finetuning: task.instructions; facts: made-up facts, with a rate that falls linearly "
        "from memory_lr; comparison: the same facts by several methods. Without a base: pretraining",
    )
    seed: int = option(0, "seed of weights and data", 0)
    batch_size: int = option(4, "independent streams b", 1)
    gradient_accumulation_steps: int = option(4, "batches per optimizer step", 1)
    max_steps: int = option(10_000, "optimizer steps", 1)
    max_cpu_seconds: float | None = option(None, "stop after this much CPU time; null: no limit", 0.0)
    base_model_lr: float = option(1e-5, "learning rate of all parameters outside memories and gates", 0.0)
    memory_lr: float = option(1e-4, "learning rate of the memories", 0.0)
    lora_lr: float = option(1e-4, "learning rate of the LoRA matrices", 0.0)
    gate_lr: float = option(1e-4, "learning rate of the gates, which have no weight decay", 0.0)
    lr_schedule: Literal["cosine", "linear", "constant"] = option("cosine", "decay after the warm-up")
    warmup_steps: int = option(100, "steps in which the learning rate rises from 0", 0)
    min_lr_ratio: float = option(0.1, "final learning rate / full learning rate", 0.0, 1.0)
    weight_decay: float = option(0.01, "AdamW weight decay, on matrices only", 0.0)
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down", 0.0)
    gradient_checkpointing: bool = option(
        False, "keep fewer activations and compute the others again in the backward pass"
    )
    recompute: Literal["block", "mlp", "selective"] = option(
        "block",
        "with gradient_checkpointing, what is computed again. block: all but each block's input; mlp: the "
        "feed-forward only; selective: all but the results of matrix products",
    )
    recompute_every: int = option(1, "with recompute: block, every n-th block, from the first on", 1)
    horizon: int | None = option(
        None, "segments that gradients flow back through the memory; null: the whole example", 1
    )
    curriculum: list[Stage] = option([], "stages, in order of from_step")
    log_steps: int = option(50, "steps between two log lines", 1)
    eval_steps: int = option(500, "steps between two evaluations", 1)
    eval_examples: int = option(512, "examples in an evaluation", 1)
    save_steps: int = option(500, "steps between two checkpoints", 1)
    keep_checkpoints: int = option(2, "checkpoints kept", 1)
    async_save: bool = option(
        False,
        "on several processes: write checkpoints in a thread while training goes on, from a copy in the main "
        "memory",
    )
    num_threads: int = option(1, "torch threads; 1 is fastest on a small shared machine", 1)
    device: str = option("cpu", "cpu, cuda, cuda:1, …")
