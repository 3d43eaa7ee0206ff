"""Expert parallelism: each data-parallel rank owns some chapters of every bank, and queries travel to them.

A rank holds c / ranks chapters: their tokens, gradients and optimizer state. In a read

1. each rank selects chapters for its own rows, and sends each query to the owners of its k chapters;
2. an owner computes, for each of its chapters, attention of all queries that it was sent, with the
   log-sum-exp of their scores;
3. results return, and one softmax over log-sum-exp + log w merges the k of each query, as if their tokens
   had stood side by side:  y = sum_c softmax_c(lse_c + log w_c) y_c.

Keys and values never travel, and no rank projects chapters that it does not own. All tokens of a row go to
the same chapters where the selection is one per segment, as in training.

Everything is applied from outside: the memory's `read_chapters` is replaced.
Source: Shazeer et al. 2017, arXiv 1701.06538; Lepikhin et al. 2020, arXiv 2006.16668 (all-to-all).

Axes: b rows of this rank, g decisions of a row, r tokens of a decision, k chapters selected by each, s ranks,
q received queries (of one decision for one chapter), d hidden, h heads, w head width, u chapters of a rank, t
tokens of a chapter.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from memlib.config import ConfigError
from memlib.memory.chapters.banks import ChapteredMemoryBank, Rows
from memlib.memory.chapters.memory import ChapterMemory
from memlib.models import MemoryTransformer
from memlib.ops import attention_with_lse
from memlib.training.parallel.ranks import Ranks


def divide_chapters(model: MemoryTransformer, ranks: Ranks, dtype: torch.dtype | None) -> set[nn.Parameter]:
    """Give this rank its chapters of every bank, in place; returns the parameters so divided.

    dtype: to compute in, None for the parameters' own. Raises ConfigError for banks that cannot be divided.
    """
    routed = [m for _, _, m in model.stack if isinstance(m, ChapterMemory) and m.router is not None]
    if not routed:
        raise ConfigError(
            f"parallel.expert_parallel: memory.kinds = {model.config.memory.kinds} has no chapters that a "
            "router selects; add chapters with memory.chapters.use_chapters: true, or set it to false"
        )
    size, divided = ranks.data_size, set[nn.Parameter]()
    if ranks.mesh is None or size == 1:
        return divided
    for memory in routed:
        options = memory.config
        if options.num_chapters % size or options.quantize_memory:
            raise ConfigError(
                f"parallel.expert_parallel: {size} data-parallel ranks must divide "
                f"memory.chapters.num_chapters = {options.num_chapters}, and tokens must not be rounded in "
                f"training (memory.chapters.quantize_memory = {options.quantize_memory})"
            )
    mesh: Any = ranks.mesh["replicate", "shard"]
    group = mesh._flatten("data").get_group()
    for memory in routed:
        rows = token_rows(memory)
        if rows.weight not in divided:  # layers may share a bank
            rows.weight = nn.Parameter(distribute_tensor(rows.weight.detach(), mesh, [Shard(0), Shard(0)]))
            rows.weight.register_hook(partial(averaged, size))
            rows.forward = partial(own_rows, rows, dtype)  # type: ignore[method-assign]
            divided.add(rows.weight)
        memory.read_chapters = partial(read_from_owners, memory, group)  # type: ignore[method-assign]
    return divided


def averaged(size: int, gradient: Tensor) -> Tensor:
    """An owner has the sum over the rows of all ranks; FSDP averages other gradients over the ranks."""
    return gradient / size


def token_rows(memory: ChapterMemory) -> Rows:
    """The part of a bank that has a row for each token."""
    bank: Any = cast(ChapteredMemoryBank, memory.bank).bank
    return cast(Rows, getattr(bank, "tokens", None) or bank.left)


def own_rows(rows: Rows, dtype: torch.dtype | None, index: Tensor | None = None) -> Tensor:
    """`Rows` that returns this rank's, counted from its first."""
    weight = cast(Any, rows.weight).to_local()
    weight = weight if dtype is None else weight.to(dtype)
    return weight if index is None else weight[index]


def read_from_owners(
    memory: ChapterMemory, group: dist.ProcessGroup, hidden: Tensor, indices: Tensor, log_weights: Tensor
) -> Tensor:
    """`ChapterMemory.read_chapters` with chapters on all ranks of a group: [b n d], [b g k] -> [b n d]."""
    (b, g, k), size, attention = indices.shape, group.size(), memory.attention
    queries = rearrange(attention.queries(hidden), "b h (g r) w -> (b g) r h w", g=g)
    chapters = rearrange(indices, "b g k -> (b g k)")
    order = chapters.argsort(stable=True)  # queries of one chapter, and of one owner, stand together
    counts = torch.bincount(chapters, minlength=memory.config.num_chapters)
    arriving = torch.empty_like(counts)  # for each rank, how many for each chapter here
    dist.all_to_all_single(arriving, counts, group=group)
    sent, received = (reduce(part, "(s u) -> s", "sum", s=size).tolist() for part in (counts, arriving))
    theirs = _Exchange.apply(queries[order // k], received, sent, group)
    attend = partial(attend_own, memory, rearrange(arriving, "(s u) -> s u", s=size))
    if attention.gradient_checkpointing and torch.is_grad_enabled():
        results = checkpoint(attend, theirs, use_reentrant=False)
    else:
        results = attend(theirs)
    mine = _Exchange.apply(results, sent, received, group)[order.argsort()]
    mine = rearrange(mine, "(b g k) r h w -> k b g r h w", b=b, g=g)
    score = mine[..., -1] + rearrange(log_weights, "b g k -> k b g 1 1")
    read = reduce(mine[..., :-1] * torch.softmax(score, 0).unsqueeze(-1), "k b g r h w -> b g r h w", "sum")
    return attention.o_proj(rearrange(read, "b g r h w -> b (g r) (h w)").to(hidden.dtype))


def attend_own(memory: ChapterMemory, counts: Tensor, queries: Tensor) -> Tensor:
    """Each query's attention over its chapter, and the log-sum-exp: [q r h w] -> [q r h w+1].

    counts: [s u], how many queries each rank has sent for each chapter, in this order.
    """
    size, own = counts.shape
    heads, attention = queries.shape[2], memory.attention
    tokens = cast(ChapteredMemoryBank, memory.bank).chapters(torch.arange(own, device=queries.device))
    tokens = tokens.to(queries.dtype)
    keys, values = (
        rearrange(project(tokens), "u t (h w) -> u 1 h t w", h=heads)
        for project in (attention.k_proj, attention.v_proj)
    )
    place = repeat(torch.arange(own, device=queries.device), "u -> (s u)", s=size)
    order = place.repeat_interleave(counts.flatten()).argsort(stable=True)
    parts = queries[order].split(counts.sum(0).tolist())
    results = []
    for part, key, value in zip(parts, keys, values, strict=True):
        read, lse = attention_with_lse(rearrange(part, "q r h w -> 1 h (q r) w"), key, value)
        both = torch.cat((read.to(lse.dtype), lse.unsqueeze(-1)), -1)
        results.append(rearrange(both, "1 h (q r) w -> q r h w", r=queries.shape[1]))
    return torch.cat(results)[order.argsort()]


class _Exchange(torch.autograd.Function):
    """Rows to other ranks: the first sent[0] to the first rank, and so on; gradients go back the same way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        found = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back = _Exchange.apply(gradient, *ctx.splits, ctx.group)
        return back, None, None, None
