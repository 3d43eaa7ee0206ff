"""Configuration: dataclasses, YAML files, and errors that name the full path of a bad field.

One `Config` describes a run: `model` (the transformer), `memory` (which memories, in which layers, fused
how), `task` (the data) and `training` (the optimization). Each field carries its documentation and its
limits, so that validation, `memlib config show` and `docs/config.md` have one source.
"""

from __future__ import annotations

from memlib.config.adapter import AdapterConfig
from memlib.config.config import (
    Config,
    check_sizes,
    get_memory_bank_assignments,
    get_memory_kinds,
    get_memory_layer_indices,
    validate,
)
from memlib.config.fields import ConfigError, from_dict, option, override
from memlib.config.files import (
    differences,
    load_config,
    parse_overrides,
    preset_names,
    save_config,
    to_dict,
)
from memlib.config.memory import (
    ChaptersMemoryConfig,
    ExternalMemoryConfig,
    FactsMemoryConfig,
    HdsMemoryConfig,
    IndexConfig,
    InternalMemoryConfig,
    LtmMemoryConfig,
    MemoryConfig,
    RingMemoryConfig,
)
from memlib.config.model import ModelConfig
from memlib.config.parallel import ParallelConfig
from memlib.config.reference import reference, reference_page
from memlib.config.task import (
    CopyConfig,
    DocumentsConfig,
    InstructionsConfig,
    MixedConfig,
    PasskeyConfig,
    QaConfig,
    RecallConfig,
    SourceConfig,
    TaskConfig,
    TextConfig,
    TopicsConfig,
)
from memlib.config.training import Stage, TrainingConfig

__all__ = [
    "AdapterConfig",
    "ChaptersMemoryConfig",
    "Config",
    "ConfigError",
    "CopyConfig",
    "DocumentsConfig",
    "ExternalMemoryConfig",
    "FactsMemoryConfig",
    "IndexConfig",
    "InstructionsConfig",
    "HdsMemoryConfig",
    "InternalMemoryConfig",
    "LtmMemoryConfig",
    "MemoryConfig",
    "ModelConfig",
    "MixedConfig",
    "ParallelConfig",
    "PasskeyConfig",
    "QaConfig",
    "RecallConfig",
    "RingMemoryConfig",
    "SourceConfig",
    "Stage",
    "TaskConfig",
    "TextConfig",
    "TopicsConfig",
    "TrainingConfig",
    "check_sizes",
    "differences",
    "from_dict",
    "get_memory_bank_assignments",
    "get_memory_kinds",
    "get_memory_layer_indices",
    "load_config",
    "option",
    "override",
    "parse_overrides",
    "preset_names",
    "reference",
    "reference_page",
    "save_config",
    "to_dict",
    "validate",
]
