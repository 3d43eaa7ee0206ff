"""The complete configuration: all groups, the checks across groups, and which layers have memory."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass

from memlib.config.adapter import AdapterConfig
from memlib.config.fields import ConfigError, check_fields, option, override
from memlib.config.memory import MemoryConfig
from memlib.config.model import ModelConfig
from memlib.config.parallel import ParallelConfig
from memlib.config.task import TaskConfig
from memlib.config.training import Stage, TrainingConfig


@dataclass(kw_only=True)
class Config:
    """The configuration of a run."""

    model: ModelConfig = option(ModelConfig, "the transformer")
    memory: MemoryConfig = option(MemoryConfig, "the memories")
    task: TaskConfig = option(TaskConfig, "the data: what the model is trained and measured on")
    training: TrainingConfig = option(TrainingConfig, "the training loop")
    parallel: ParallelConfig = option(ParallelConfig, "training on several processes")
    adapter: AdapterConfig = option(AdapterConfig, "what is added to a pretrained model")

    def __post_init__(self) -> None:
        validate(self)


def get_memory_layer_indices(config: Config) -> list[int]:
    """Indices of the layers with memory, ascending; empty for the baseline and in vanilla mode."""
    memory, layers = config.memory, config.model.num_layers
    if memory.vanilla_mode or not memory.kinds:
        return []
    count = min(memory.memory_layer_k, layers)
    return {
        "all": list(range(layers)),
        "first_k": list(range(count)),
        "last_k": list(range(layers - count, layers)),
        "every_n": list(range(memory.memory_layer_n - 1, layers, memory.memory_layer_n)),
        "custom": sorted(set(memory.memory_layer_custom or [])),
    }[memory.memory_layer_placement]


def get_memory_kinds(config: Config) -> dict[int, list[str]]:
    """Memory layer -> names of its memories, in the order of `memory.kinds`."""
    memory = config.memory
    return {
        layer: [kind for kind in memory.kinds if (i + 1) % getattr(memory, kind).every == 0]
        for i, layer in enumerate(get_memory_layer_indices(config))
    }


def get_memory_bank_assignments(config: Config) -> dict[int, int]:
    """Memory layer -> index of its sharing group; layers of one group share one state."""
    sharing = config.memory.memory_sharing
    group = {"shared": config.model.num_layers, "per_layer": 1}.get(sharing, config.memory.memory_sharing_k)
    return {layer: i // group for i, layer in enumerate(get_memory_layer_indices(config))}


def validate(config: Config) -> Config:
    """Check types, limits and combinations; returns the config, raises ConfigError.

    With a pretrained base its sizes count, not those of `model`: `MemoryAdapter` calls `check_sizes`.
    """
    check_fields(config, "")
    check_memories(config.memory)
    if config.adapter.base_model_name is None:
        check_sizes(config)
        if config.training.training_mode != "pretraining":
            raise ConfigError(
                f"training.training_mode = {config.training.training_mode!r}: is for a pretrained base only; "
                "set adapter.base_model_name, or training.training_mode: pretraining"
            )
    task = config.task
    if task.segments_min is not None and task.segments_min > task.segments:
        raise ConfigError(
            f"task.segments_min = {task.segments_min}: must be at most task.segments = {task.segments}"
        )
    steps = [stage.from_step for stage in config.training.curriculum]
    if steps != sorted(set(steps)):
        raise ConfigError(f"training.curriculum: from_step must increase from stage to stage, not {steps}")
    for i, stage in enumerate(config.training.curriculum):
        check_stage(config, stage, f"training.curriculum[{i}].set")
    check_parallel(config)
    return config


def check_memories(memory: MemoryConfig) -> None:
    """Raise ConfigError for memories that do not exist and combinations that no model supports."""
    known = [f.name for f in fields(memory) if is_dataclass(getattr(memory, f.name))]
    for i, kind in enumerate(memory.kinds):
        if kind not in known:
            raise ConfigError(f"memory.kinds[{i}] = {kind!r}: known memories: {', '.join(known)}")
        if kind in memory.kinds[:i]:
            raise ConfigError(f"memory.kinds[{i}] = {kind!r}: named twice")
        if getattr(memory, kind).in_attention and memory.fusion == "residual":
            raise ConfigError(
                f"memory.fusion = 'residual': memory.{kind} is set to be read inside the attention, which "
                "residual fusion does not support; set fusion: softmax, or use "
                f"memory.{kind} with fusion instead of inside the attention"
            )
    if memory.memory_layer_placement == "custom" and not memory.memory_layer_custom:
        raise ConfigError("memory.memory_layer_custom: needed when memory_layer_placement is custom")
    if memory.memory_block_variant == "B" and memory.fusion == "softmax":
        raise ConfigError(
            "memory.memory_block_variant = 'B': is available with memory.fusion: residual only; "
            "set fusion: residual or memory_block_variant: A"
        )


def check_sizes(config: Config) -> None:
    """Raise ConfigError unless heads, layers and the memories' sizes fit the model's."""
    model, memory = config.model, config.memory
    if model.hidden_dim % model.num_heads:
        raise ConfigError(
            f"model.num_heads = {model.num_heads}: must divide model.hidden_dim = {model.hidden_dim}"
        )
    if model.use_rope and (model.hidden_dim // model.num_heads) % 2:
        raise ConfigError(
            f"model.num_heads = {model.num_heads}: rotary positions need an even head width, "
            f"not {model.hidden_dim // model.num_heads}; change num_heads or set model.use_rope: false"
        )
    for i, layer in enumerate(memory.memory_layer_custom or []):
        if memory.memory_layer_placement == "custom" and not 0 <= layer < model.num_layers:
            raise ConfigError(
                f"memory.memory_layer_custom[{i}] = {layer}: "
                f"layers are 0 … {model.num_layers - 1}; change it or model.num_layers"
            )
    if memory.kinds and not memory.vanilla_mode and not get_memory_layer_indices(config):
        raise ConfigError(
            f"memory.memory_layer_n = {memory.memory_layer_n}: no layer has memory with "
            f"model.num_layers = {model.num_layers}; make it smaller"
        )
    for kind in memory.kinds:
        layers = len(get_memory_layer_indices(config))
        if not memory.vanilla_mode and getattr(memory, kind).every > layers:
            raise ConfigError(
                f"memory.{kind}.retrieval_every = {getattr(memory, kind).every}: only {layers} layers have "
                "memory; make it smaller"
            )
        getattr(memory, kind).check(model, f"memory.{kind}")


def check_parallel(config: Config) -> None:
    """Raise ConfigError for layouts that no number of processes can have."""
    parallel, model = config.parallel, config.model
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    for name in ("num_heads", "intermediate_dim"):
        if getattr(model, name) % tensor:
            raise ConfigError(
                f"parallel.tensor_parallel_size = {tensor}: must divide model.{name} = {getattr(model, name)}"
            )
    if tensor == 1 and (parallel.sequence_parallel or parallel.loss_parallel):
        name = "sequence_parallel" if parallel.sequence_parallel else "loss_parallel"
        raise ConfigError(f"parallel.{name}: needs parallel.tensor_parallel_size of at least 2")
    if (parallel.distributed_strategy == "hsdp") != (parallel.shard_size is not None):
        raise ConfigError(
            f"parallel.shard_size = {parallel.shard_size}: belongs to "
            "parallel.distributed_strategy: hsdp, which needs it"
        )
    if stages == 1:
        return
    if parallel.expert_parallel:
        raise ConfigError(
            f"parallel.expert_parallel: with pipeline_parallel_size = {stages} each microbatch would wait "
            "for the other ranks' in every read; use parallel.distributed_strategy: fsdp without stages"
        )
    parts = stages * (2 if parallel.pipeline_schedule == "interleaved" else 1)
    if parts > model.num_layers:
        raise ConfigError(
            f"parallel.pipeline_parallel_size = {stages}: {parallel.pipeline_schedule} makes {parts} stages "
            f"of model.num_layers = {model.num_layers}; make it smaller"
        )
    if model.tie_embeddings:
        raise ConfigError(
            "model.tie_embeddings: the first and the last stage of a pipeline would share a matrix; set it "
            "to false, or parallel.pipeline_parallel_size: 1"
        )
    if parallel.loss_parallel:
        raise ConfigError(
            "parallel.loss_parallel: the last stage of a pipeline takes the loss of whole logits; set it to "
            "false, or parallel.pipeline_parallel_size: 1"
        )
    if config.training.batch_size % parallel.pipeline_microbatches:
        raise ConfigError(
            f"parallel.pipeline_microbatches = {parallel.pipeline_microbatches}: must divide "
            f"training.batch_size = {config.training.batch_size}"
        )


def check_stage(config: Config, stage: Stage, path: str) -> None:
    """Raise ConfigError unless the stage's task fields exist and are valid."""
    try:
        override(config.task, stage.set)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
