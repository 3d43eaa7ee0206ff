"""Memories and LoRA in pretrained models, their files, and where pretrained weights come from."""
