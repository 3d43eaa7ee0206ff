"""Options of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from memlib.config.fields import option


@dataclass(kw_only=True)
class Stage:
    """One stage of the curriculum: from a step on, these task fields have these values."""

    from_step: int = option(0, "first step of the stage", 0)
    set: dict[str, Any] = option({}, "task fields by path, e.g. {segments: 2, recall.num_pairs: 1}")


@dataclass(kw_only=True)
class TrainingConfig:
    """How it is trained."""

    seed: int = option(0, "seeds weights and data", 0)
    batch_size: int = option(4, "independent streams b", 1)
    gradient_accumulation_steps: int = option(4, "batches per optimizer step", 1)
    max_steps: int = option(10_000, "optimizer steps", 1)
    max_cpu_seconds: float | None = option(None, "stop after this much processor time", 0.0)
    base_model_lr: float = option(1e-5, "learning rate of everything that is not memory", 0.0)
    memory_lr: float = option(1e-4, "learning rate of the memories", 0.0)
    gate_lr: float = option(1e-4, "learning rate of the gates (they get no weight decay)", 0.0)
    lr_schedule: Literal["cosine", "linear", "constant"] = option("cosine", "after the warm-up")
    warmup_steps: int = option(100, "steps from 0 to the full rate", 0)
    min_lr_ratio: float = option(0.1, "the schedule ends at this part of the full rate", 0.0, 1.0)
    weight_decay: float = option(0.01, "AdamW's, on matrices only", 0.0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", 0.0)
    gradient_checkpointing: bool = option(
        False, "keep of each block only its input, and compute it again in the backward pass"
    )
    horizon: int | None = option(
        None, "segments that gradients flow back through memory; null: the whole example", 1
    )
    curriculum: list[Stage] = option([], "stages, in order of from_step")
    log_steps: int = option(50, "steps between two log lines", 1)
    eval_steps: int = option(500, "steps between two evaluations", 1)
    eval_examples: int = option(512, "examples in an evaluation", 1)
    save_steps: int = option(500, "steps between two checkpoints", 1)
    keep_checkpoints: int = option(2, "checkpoints kept", 1)
    num_threads: int = option(1, "torch threads; one is fastest on a shared small machine", 1)
    device: str = option("cpu", "cpu, cuda, cuda:1, …")
