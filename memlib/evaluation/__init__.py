"""Measuring what a model can do."""

from __future__ import annotations

from memlib.evaluation.evaluate import Score, evaluate

__all__ = ["Score", "evaluate"]
