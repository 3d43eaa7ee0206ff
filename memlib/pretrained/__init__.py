"""Pretrained models: fetch, load, and extend them with memories."""
