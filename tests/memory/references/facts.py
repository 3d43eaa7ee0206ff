"""The equations of facts that were written: a mean of tokens, a whitened key, a null slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Reference, Row


class FactsReference(Reference):
    variants = ({"window": 1}, {"start": "random", "window": 2, "threshold": 0.4})

    def init_row(self, memory: Any) -> Row:
        return {"recent": [], "counts": None}

    def opened_row(self, memory: Any, row: Row, hidden: Tensor, mask: Tensor) -> Row:
        earlier = [x for x, counts in zip(hidden, mask, strict=False) if counts]
        return {"recent": [*row["recent"], *earlier], "counts": mask[len(hidden) :]}

    def read_row(self, memory: Any, hidden: Tensor, row: Row) -> Tensor:
        recent, said = list(row["recent"]), []
        for t, x in enumerate(hidden):
            if row["counts"] is not None and not row["counts"][t]:
                said.append(torch.zeros_like(x))  # padding has no output to compare
                continue
            recent.append(x)
            newest = recent[-self.config.window :]
            said.append(self.fact(memory, sum(newest) / len(newest)))
        return torch.stack(said)

    def fact(self, memory: Any, mean: Tensor) -> Tensor:
        """sum_i e^{s_i} v_i / (1 + sum_i e^{s_i}),  s_i = sharpness (max_p cos - threshold)."""
        query = (mean - memory.center) @ memory.whiten
        query = query / query.norm()
        total, said = 1.0, 0.0 * (query + memory.values.sum())  # an empty table is a graph too
        for keys, used, value in zip(memory.keys, memory.used, memory.values, strict=True):
            cosines = [query @ key for key, is_used in zip(keys, used, strict=True) if is_used]
            if cosines:
                share = torch.exp(self.config.sharpness * (max(cosines) - self.config.threshold))
                total, said = total + share, said + share * value
        return said / total

    def write_row(self, memory: Any, hidden: Tensor, row: Row, mask: Tensor) -> Row:
        tokens = [*row["recent"], *(x for x, counts in zip(hidden, mask, strict=True) if counts)]
        return {"recent": tokens[max(0, len(tokens) - self.config.window + 1) :], "counts": None}

    def named(self, memory: Any, row: Row) -> dict[str, Any]:
        return {"recent": row["recent"]}

    def theirs(self, memory: Any, state: Any, b: int) -> dict[str, Any]:
        return {"recent": list(state.recent[b][state.mask[b]])}
