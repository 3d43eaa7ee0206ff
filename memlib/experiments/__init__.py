"""Experiments: train and compare several configurations, and the runs behind each published table."""
