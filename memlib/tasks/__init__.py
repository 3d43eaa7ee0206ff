"""Tasks for training and evaluation: generated tasks with known chance levels, and real text.

`Instructions` and `packed` yield conversations and documents in a pretrained model's tokens.

To add a task: a file here with a `Task` subclass, a dataclass of options, a field of `TaskConfig` with the
task's name, and a line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable

from memlib.config import TaskConfig
from memlib.tasks.base import Batch, Task
from memlib.tasks.copy import Copy
from memlib.tasks.instructions import Instructions
from memlib.tasks.mixed import Mixed
from memlib.tasks.packing import packed
from memlib.tasks.passkey import Passkey, passkey_grid
from memlib.tasks.qa import Qa
from memlib.tasks.recall import Recall
from memlib.tasks.text import Text
from memlib.tasks.text_documents import TextDocuments, open_text
from memlib.tasks.topics import Topics

TASKS: dict[str, Callable[..., Task]] = {
    "recall": Recall,
    "passkey": Passkey,
    "mixed": Mixed,
    "topics": Topics,
    "copy": Copy,
    "qa": Qa,
    "text": open_text,
}

__all__ = [
    "TASKS",
    "Batch",
    "Copy",
    "Instructions",
    "Mixed",
    "Passkey",
    "Qa",
    "Recall",
    "Task",
    "Text",
    "TextDocuments",
    "Topics",
    "make_task",
    "packed",
    "passkey_grid",
]


def make_task(config: TaskConfig, segment_length: int) -> Task:
    """Build the configured task, with segments of `segment_length` tokens.

    Raises ValueError if an example does not fit into its segments.
    """
    options = getattr(config, config.name)
    return TASKS[config.name](options, segment_length, config.segments, config.segments_min)
