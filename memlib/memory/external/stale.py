"""Stale keys: how far the encoder has changed since it made the keys of a store.

Stored keys stay fixed while training changes the encoder, so old keys and new queries drift apart. Unit
length keeps their scales equal (Memorizing Transformers), but directions still drift. Therefore a store
records for each row a sketch of its encoder: the encoder's keys for a few fixed inputs. Comparing sketches
needs neither the old weights nor the old text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from memlib.memory.external.store import Store


@dataclass(frozen=True)
class StaleKeys:
    """encoder: index of an encoder (-1: not recorded); rows: live rows with keys from it.

    drift: mean of 1 - cosine between that encoder's sketch and the current one, 0 if equal; None if not
    recorded.
    """

    encoder: int
    rows: int
    drift: float | None


def stale_keys(store: Store, sketch: Tensor) -> list[StaleKeys]:
    """Compare the encoders of a store's keys, oldest first, with the current sketch: [... k]."""
    rows: Counter[int] = Counter()
    for stream in store.streams.values():
        rows.update(stream.encoder.newest[stream.live].tolist())
    report = []
    for encoder in sorted(rows):
        drift = None
        if encoder >= 0:
            old, new = store.encoders[encoder], sketch.detach().float()
            cosine = F.cosine_similarity(old, new, dim=-1)
            # A stream's first token may have a key of zeros, which has no direction to compare.
            there = (old != 0).any(-1) & (new != 0).any(-1)
            drift = float(((1 - cosine) * there).sum() / there.sum().clamp(min=1))
        report.append(StaleKeys(encoder, rows[encoder], drift))
    return report
