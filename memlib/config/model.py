"""Options of the transformer."""

from __future__ import annotations

from dataclasses import dataclass

from memlib.config.fields import option


@dataclass(kw_only=True)
class ModelConfig:
    """The transformer without its memories."""

    hidden_dim: int = option(768, "width d of the residual stream", 1)
    num_heads: int = option(12, "attention heads h; must divide hidden_dim", 1)
    num_layers: int = option(12, "transformer blocks", 1)
    intermediate_dim: int = option(3072, "width of the SwiGLU feed-forward", 1)
    vocab_size: int = option(32000, "token ids are 0 … vocab_size - 1", 2)
    segment_length: int = option(
        512, "tokens n in a segment, which is also the attention window", 1, known_as="max_seq_len"
    )
    attention_window: int | None = option(
        None, "tokens of its segment that each token attends to, itself and the ones before; null: all", 1
    )
    use_rope: bool = option(True, "rotary positions inside the window")
    tie_embeddings: bool = option(False, "the output layer reuses the embedding matrix")
    dropout: float = option(0.0, "dropout on each residual branch", 0.0, 0.99)
