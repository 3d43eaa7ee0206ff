"""The lab: recordings of a model's activations, measures on them, and helpers for notebooks."""
