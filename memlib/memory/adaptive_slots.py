"""Adaptive slots: slots are allocated by content and reclaimed when unused.

Source: "LTM Transformer Architecture", Future Improvements (docs/coverage.md); the rule is ours.

The rule, in full. A slot is in use, or it is free: empty, and not read.

- **Taking.** A token that is written goes to the slot in use whose key is most like its own, if their cosine
  is at least `match_threshold`. Otherwise it takes the slot that was not used for longest, emptied: free
  ones come first, and of equals the lower number. A slot that is taken has the token's key and says
  nothing, before the token is written to it. So a bank grows with what there is to tell apart.
- **Use.** A slot is used by being written, or by being asked for: some token of the segment has a query
  whose cosine with the slot's key is at least `match_threshold`. Asking comes before taking.
- **Reclaiming.** A slot not used for `reclaim_after` segments is emptied and free.
- **Pruning.** A slot whose value is shorter than `prune_below` says next to nothing, is emptied and free.

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
        """The slots some token of mask: [b n] asks for; query: [b n k], keys: [b s k] -> [b s]."""
        alike = einsum(query, unit(keys), "b n k, b s k -> b n s") >= self.match_threshold
        return (alike & rearrange(mask, "b n -> b n 1")).any(1) & (age < self.reclaim_after)

    @torch.no_grad()
    def choose(
        self, new: Tensor, strength: Tensor, kept: Tensor, keys: Tensor, age: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where tokens go, one after another: each sees what those before it took and wrote.

        new: [b c k] keys, strength, kept: [b c], keys: [b s k], age: [b s] segments since last use, -1 if
        used in this one -> the slot of each token [b c], whether it was taken anew [b c], and the ages. A
        token that is not kept is told where it would have gone, and takes nothing.
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
        """The end of a segment: slots [b s e], values being their second halves, and ages [b s], with what is
        unused or faint emptied and free."""
        age = (age + 1).clamp(max=self.reclaim_after)
        faint = values.detach().norm(dim=-1) < self.prune_below
        age = age.masked_fill(faint, self.reclaim_after)
        return slots * rearrange(age < self.reclaim_after, "b s -> b s 1"), age
