"""What models are trained and measured on: generated tasks with computed chance levels, real text.

A task is a file here with a `Task` subclass, a dataclass and a field of `TaskConfig` of the same
name, and a line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable

from memlib.config import TaskConfig
from memlib.tasks.base import Batch, Task
from memlib.tasks.copy import Copy
from memlib.tasks.mixed import Mixed
from memlib.tasks.passkey import Passkey, passkey_grid
from memlib.tasks.qa import Qa
from memlib.tasks.recall import Recall
from memlib.tasks.text import Text
from memlib.tasks.topics import Topics

TASKS: dict[str, Callable[..., Task]] = {
    "recall": Recall,
    "passkey": Passkey,
    "mixed": Mixed,
    "topics": Topics,
    "copy": Copy,
    "qa": Qa,
    "text": Text,
}

__all__ = [
    "TASKS",
    "Batch",
    "Copy",
    "Mixed",
    "Passkey",
    "Qa",
    "Recall",
    "Task",
    "Text",
    "Topics",
    "make_task",
    "passkey_grid",
]


def make_task(config: TaskConfig, segment_length: int) -> Task:
    """The task that a configuration describes, in segments of `segment_length` tokens.

    Raises ValueError if the examples do not fit the segments.
    """
    options = getattr(config, config.name)
    return TASKS[config.name](options, segment_length, config.segments, config.segments_min)
