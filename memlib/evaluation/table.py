"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table from its header and rows."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def span(values: Sequence[float], form: str) -> str:
    """The range of some values, or the value if all are equal as shown."""
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"
