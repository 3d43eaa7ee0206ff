"""Memories and LoRA in pretrained models: adapters, their files, and where pretrained weights come from."""
