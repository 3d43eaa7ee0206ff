"""Runs side by side, and which runs make which table."""
