"""Every memory, one file or subpackage each, and the registry of their names.

A memory is added with its file here, its dataclass and field in `memlib.config.memory`, and its line below:
CONTRIBUTING.md walks through it. The laws, references, recordings and comparisons then cover it.
"""

from __future__ import annotations

from memlib.memory.base import Memory, State, axes
from memlib.memory.chapters.memory import ChapterMemory
from memlib.memory.external.memory import ExternalMemory
from memlib.memory.facts import FactMemory
from memlib.memory.hds import HdsMemory
from memlib.memory.internal import InternalMemory
from memlib.memory.ltm import LongTermMemory
from memlib.memory.ring import RingMemory

MEMORIES: dict[str, type[Memory]] = {
    "internal": InternalMemory,
    "ltm": LongTermMemory,
    "hds": HdsMemory,
    "ring": RingMemory,
    "external": ExternalMemory,
    "chapters": ChapterMemory,
    "facts": FactMemory,
}

__all__ = [
    "MEMORIES",
    "ChapterMemory",
    "ExternalMemory",
    "FactMemory",
    "HdsMemory",
    "InternalMemory",
    "LongTermMemory",
    "Memory",
    "RingMemory",
    "State",
    "axes",
]
