"""A kNN language model over a store: the next token after similar places, without training.

    p(v) = (1 - l) p_base(v) + l sum_{i: v_i = v} softmax_i(beta cos(h, k_i))    l = strength where cos > t

Keys are the base's last hidden states where a completion begins, values the tokens that begin it. Below the
threshold t the base is left alone: without it a store of a hundred facts changes every text.
Source: Khandelwal et al. 2020, arXiv 1911.00172; the threshold is ours.

Axes: b batch, t tokens, n places, j hits, d hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlib.memory.external.columns import Shape
from memlib.memory.external.store import Store
from memlib.nn.linear import unit
from memlib.pretrained.teaching import Pair, batch_of
from memlib.tasks.instructions import IGNORED


class NearestNeighbourLM(nn.Module):
    """A pretrained model beside a store of (hidden state, next token).

    strength: l; threshold: t, a cosine; sharpness: beta; top_k: hits of a search.
    """

    def __init__(
        self,
        base: Any,
        strength: float = 0.9,
        threshold: float = 0.8,
        sharpness: float = 50.0,
        top_k: int = 8,
        capacity: int = 65_536,
    ) -> None:
        super().__init__()
        self.base, self.strength, self.threshold = base, strength, threshold
        self.sharpness, self.top_k = sharpness, top_k
        self.store = Store(Shape(1, base.config.hidden_size, 1, capacity))
        self.stream, self.cursor = self.store.new_stream(), 0

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, keep: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The base's logits [b t v] and what they are made of, at length 1 [b t d], of `keep` last tokens."""
        output = self.base(
            input_ids, attention_mask=attention_mask, output_hidden_states=True, logits_to_keep=keep
        )
        return output.logits, unit(output.hidden_states[-1][:, -keep:].float())

    @torch.no_grad()
    def write(self, tokenizer: Any, pairs: Sequence[Pair]) -> None:
        """Store where each prompt ends, with the first token of its completion."""
        for start in range(0, len(pairs), 50):
            batch = batch_of(tokenizer, pairs[start : start + 50])
            _, keys = self.hidden(batch["input_ids"], batch["attention_mask"])
            first = (batch["labels"] != IGNORED).int().argmax(1)
            rows = torch.arange(len(first))
            tokens = batch["labels"][rows, first].float()
            self.stream, self.cursor = self.store.append(
                self.stream,
                self.cursor,
                rearrange(keys[rows, first - 1], "n d -> 1 n d"),
                rearrange(tokens, "n -> 1 n 1"),
            )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """As the base's; the logits are log p."""
        logits, keys = self.hidden(input_ids, attention_mask, logits_to_keep)
        log_base = torch.log_softmax(logits.float(), -1)
        query = rearrange(keys, "b t d -> 1 (b t) d")
        hits = self.store.search(self.stream, self.cursor, query, self.top_k, keys=False)
        score = hits.score[0].masked_fill(hits.serial[0] < 0, -torch.inf)  # [n j]
        share = torch.softmax(self.sharpness * score, -1)
        tokens = hits.values[0, ..., 0].long()
        near = torch.zeros(len(score), logits.shape[-1]).scatter_add_(1, tokens, share)
        strength = self.strength * (score.amax(-1, keepdim=True) > self.threshold)
        mixed = (1 - strength) * rearrange(log_base, "b t v -> (b t) v").exp() + strength * near
        log_p = rearrange(mixed.clamp(min=1e-30).log(), "(b t) v -> b t v", b=len(logits))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                rearrange(log_p[:, :-1], "b t v -> (b t) v"), rearrange(labels[:, 1:], "b t -> (b t)")
            )
        return CausalLMOutputWithPast(loss=loss, logits=log_p)
