"""Pretrained models: `lora.py`: LoRA; `targets.py`: which layers it adapts; `peft_files.py`: PEFT's files."""
