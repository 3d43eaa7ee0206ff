"""An adapter's configuration with what transformers' Trainer and its callbacks ask of `model.config`."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, ClassVar

from memlib.config import Config


class AdapterModelConfig(Config):
    """memlib's configuration of an adapter; `base_config` is transformers' configuration of its base."""

    # Outputs that evaluation does not gather: values of many tensors, or without a batch axis.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "memory_state", "router_losses"]
    base_config: Any = None

    @classmethod
    def of(cls, config: Config, base_config: Any) -> AdapterModelConfig:
        """The same configuration for an adapter on a base."""
        made = cls(**{field.name: getattr(config, field.name) for field in fields(config)})
        made.base_config = base_config
        return made

    def get_text_config(self) -> Any:
        """The base's configuration, where Trainer sets a tokenizer's special tokens."""
        return self.base_config

    def to_dict(self) -> dict[str, Any]:
        """memlib's fields as nested dictionaries."""
        return asdict(self)

    def to_json_string(self) -> str:
        """memlib's fields as JSON, for a log."""
        return json.dumps(self.to_dict(), indent=2)
