"""Evaluation: accuracy, retrieval, ablations, compression, long streams and capacity."""

from __future__ import annotations

from memlib.evaluation.evaluate import Score, evaluate

__all__ = ["Score", "evaluate"]
