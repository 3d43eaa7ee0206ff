"""Stale keys: how far an encoder has moved since it made the keys of a store.

A stored key stays as it was while training changes what makes new keys, so old and new stop meeting.
Unit-length keys and queries keep their scales together (Memorizing Transformers); their directions
drift all the same. So a store notes, with each row, a sketch of the encoder that made it: its keys of a
few fixed inputs. Comparing sketches needs neither the old weights nor the old text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from memlib.memory.external.store import Store


@dataclass(frozen=True)
class StaleKeys:
    """rows: live rows whose keys one encoder made (-1: it was not noted).

    drift: mean of 1 - cos between that encoder's sketch and today's, 0 where nothing has moved; None
    where it was not noted.
    """

    encoder: int
    rows: int
    drift: float | None


def stale_keys(store: Store, sketch: Tensor) -> list[StaleKeys]:
    """What a store's keys were made by, oldest encoder first, against today's sketch: [... k]."""
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
