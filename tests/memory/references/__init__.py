"""The equations of each registered memory in plain loops, which the memory must equal.

A memory that is registered needs a line here and a file beside this one; `test_references.py` then compares
values, states and gradients in each of its variants.
"""

from __future__ import annotations

from .base import Reference
from .chapters import ChaptersReference
from .external import ExternalReference
from .facts import FactsReference
from .hds import HdsReference
from .internal import InternalReference
from .ltm import LtmReference
from .ring import RingReference

REFERENCES: dict[str, type[Reference]] = {
    "internal": InternalReference,
    "ltm": LtmReference,
    "hds": HdsReference,
    "ring": RingReference,
    "external": ExternalReference,
    "chapters": ChaptersReference,
    "facts": FactsReference,
}

__all__ = ["REFERENCES", "Reference"]
