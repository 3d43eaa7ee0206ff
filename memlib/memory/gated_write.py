"""Writing to slots through gates, all tokens of a segment at once.

Axes: b batch, n tokens of a segment, s slots, e slot width.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor


def gated_write(slots: Tensor, strength: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """M_s <- (1 - erase_ts) M_s + strength_ts values_t for t = 1 … n, without a loop over tokens.

    After the last token, later erasures have shrunk what token t wrote:
        M_s' = prod_u (1 - erase_us) M_s + sum_t strength_ts prod_{u>t} (1 - erase_us) values_t
    slots: [b s e], strength, erase: [b n s], values: [b n e] -> [b s e] in the slots' type.
    """
    strength, erase, values = (t.to(slots.dtype) for t in (strength, erase, values))
    log_remain = torch.log1p(-erase.clamp(max=1 - 1e-6))
    total = reduce(log_remain, "b n s -> b 1 s", "sum")
    later = torch.exp(total - torch.cumsum(log_remain, 1))
    kept = slots * rearrange(torch.exp(total), "b 1 s -> b s 1")
    return kept + einsum(strength * later, values, "b n s, b n e -> b s e")
