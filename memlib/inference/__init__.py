"""Inference: generation with memory, and sessions with a separate memory for each user."""

from __future__ import annotations

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
    "generate",
    "load_state",
    "save_state",
    "stream",
    "tokenizer_for",
]
