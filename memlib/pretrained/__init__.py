"""Pretrained models: `lora.py`: LoRA; `targets.py`: which layers it adapts."""
