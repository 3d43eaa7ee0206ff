"""Inference: generation with memory, sessions with a separate memory for each user, and export."""

from __future__ import annotations

from memlib.inference.export import export_model
from memlib.inference.generate import (
    Generation,
    GenerationConfig,
    Token,
    TokenStream,
    generate,
    stream,
)
from memlib.inference.session import Sessions
from memlib.inference.states import StateError, load_state, save_state
from memlib.inference.tokenizer import ByteTokenizer, Tokenizer, WordTokenizer, decode, tokenizer_for

__all__ = [
    "ByteTokenizer",
    "Generation",
    "GenerationConfig",
    "Sessions",
    "StateError",
    "Token",
    "TokenStream",
    "Tokenizer",
    "WordTokenizer",
    "decode",
    "export_model",
    "generate",
    "load_state",
    "save_state",
    "stream",
    "tokenizer_for",
]
