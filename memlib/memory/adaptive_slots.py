"""Adaptive slots: slots are allocated by content and reclaimed when unused.

Source: "LTM Transformer Architecture", Future Improvements (docs/coverage.md); the rule is ours.

A slot is either in use or free. A free slot is empty and is not read. The rule:

- **Allocate.** A written token goes to the slot in use with the most similar key, if their cosine is at least
  `match_threshold`. Otherwise it takes the least recently used slot, emptied: free slots come first, ties go
  to the lower index. Before the token is written to it, the slot gets the token's key and a zero value.
- **Use.** A write uses a slot. So does a query: some token of the segment has a query with a cosine of at
  least `match_threshold` to the slot's key. Queries come before writes.
- **Reclaim.** A slot without use for `reclaim_after` segments is emptied and free.
- **Prune.** A slot with a value shorter than `prune_below` is emptied and free.

Axes: b batch, c tokens that are written, s slots, k key width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from memlib.nn.linear import unit


@dataclass(frozen=True)
class SlotRule:
    """The three thresholds of the rule above."""

    match_threshold: float
    reclaim_after: int
    prune_below: float

    def asked(self, query: Tensor, mask: Tensor, keys: Tensor, age: Tensor) -> Tensor:
        """Slots that match the query of a real token; query: [b n k], mask: [b n], keys: [b s k] -> [b s]."""
        alike = einsum(query, unit(keys), "b n k, b s k -> b n s") >= self.match_threshold
        return (alike & rearrange(mask, "b n -> b n 1")).any(1) & (age < self.reclaim_after)

    @torch.no_grad()
    def choose(
        self, new: Tensor, strength: Tensor, kept: Tensor, keys: Tensor, age: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The slot of each token, one after another: each token sees the allocations and writes before it.

        new: [b c k] keys, strength, kept: [b c], keys: [b s k], age: [b s] segments since last use, -1 if
        used in this one -> the slot of each token [b c], whether it was newly allocated [b c], and the ages.
        A token that is not kept gets the slot it would have, and allocates none.
        """
        slots = torch.arange(age.shape[1], device=age.device)
        chosen, fresh = [], []
        for t in range(new.shape[1]):
            cosine = einsum(unit(keys), new[:, t], "b s k, b k -> b s")
            best, alike = cosine.masked_fill(age >= self.reclaim_after, -torch.inf).max(-1)
            longest = (age * len(slots) - slots).argmax(-1)
            matched = best >= self.match_threshold
            slot = torch.where(matched, alike, longest)
            here = (slots == rearrange(slot, "b -> b 1")) & kept[:, t : t + 1]
            g = rearrange(strength[:, t], "b -> b 1 1")
            key = rearrange(new[:, t], "b k -> b 1 k")
            written = torch.where(rearrange(matched, "b -> b 1 1"), (1 - g) * keys + g * key, key)
            keys = torch.where(rearrange(here, "b s -> b s 1"), written, keys)
            age = age.masked_fill(here, -1)
            chosen.append(slot)
            fresh.append(~matched)
        return torch.stack(chosen, 1), torch.stack(fresh, 1), age

    def reclaim(self, slots: Tensor, values: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """Empty and free unused and faint slots at the end of a segment; slots: [b s e], their values, ages:
        [b s].
        """
        age = (age + 1).clamp(max=self.reclaim_after)
        faint = values.detach().norm(dim=-1) < self.prune_below
        age = age.masked_fill(faint, self.reclaim_after)
        return slots * rearrange(age < self.reclaim_after, "b s -> b s 1"), age
