"""Addresses of slots by several independent books, and what is read at an address.

Axes: b batch, n queries, h address books (banks), s slots of a book, k width of an address, e slot width.

    a_nh  = softmax_s(sharpness query_nh . table_hs)      the address in each book
    y_n   = sum_h share_nh sum_s a_nhs M_hs               share = 1 / h by default

A slot is addressed by position in a learned table, not by its content, so that reading and writing agree from
the first step on. Source: docs/coverage.md; docs/diary.md has the measurements that led to it.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from memlib_kernels.addressed_op import addressed_read_op, addressed_weights_op
from memlib_kernels.dispatch import apply, eager_cpu
from memlib_kernels.launch import runs_triton
from memlib_kernels.tiles import has_tiles


def addressed_weights(query: Tensor, table: Tensor, sharpness: Tensor | float = 1.0) -> Tensor:
    """Each query's address, which sums to 1 over each book's slots.

    query: [b n h k], table: [h s k], sharpness: a number or a learned scalar -> [b n h s].
    """
    if runs_triton(query, table) and takes_kernel("addressed_weights", query, sharpness, table):
        return addressed_weights_op(*prepared(query, table, sharpness))
    query = query * sharpness
    if eager_cpu(query, table) and query.numel():
        return apply(Addresses, query, table.to(query.dtype))
    return torch.softmax(einsum(query, table, "b n h k, h s k -> b n h s"), -1)


def addressed_weights_reference(query: Tensor, table: Tensor, sharpness: Tensor | float = 1.0) -> Tensor:
    """`addressed_weights` as its formula says."""
    return torch.softmax(sharpness * einsum(query, table, "b n h k, h s k -> b n h s"), -1)


def addressed_read(
    query: Tensor, table: Tensor, sharpness: Tensor | float, slots: Tensor, share: Tensor | None = None
) -> Tensor:
    """What each query reads at its addresses.

    query: [b n h k], table: [h s k], slots: [b h s e], share: [b n h] of each book, 1 / h by default
    -> [b n e], of the query's dtype. A kernel reads without storing the addresses: where the slots are also
    written at these addresses, call `addressed_weights` once, then `read_at`.
    """
    if runs_triton(query, table, slots, share) and takes_kernel("addressed_read", query, sharpness, slots):
        return addressed_read_op(*prepared(query, table, sharpness), slots, share)[0]
    return read_at(addressed_weights(query, table, sharpness), slots, share)


def addressed_read_reference(
    query: Tensor, table: Tensor, sharpness: Tensor | float, slots: Tensor, share: Tensor | None = None
) -> Tensor:
    """`addressed_read` as its formula says."""
    address = addressed_weights_reference(query, table, sharpness)
    if share is None:
        return einsum(address, slots.to(address.dtype), "b n h s, b h s e -> b n e") / table.shape[0]
    return einsum(share, address, slots.to(address.dtype), "b n h, b n h s, b h s e -> b n e")


def read_at(address: Tensor, slots: Tensor, share: Tensor | None = None) -> Tensor:
    """sum_h share_h a_h M_h for addresses [b n h s] that are at hand; otherwise as `addressed_read`."""
    if share is not None:
        address = address * rearrange(share.to(address.dtype), "b n h -> b n h 1")
    flat = rearrange(slots.to(address.dtype), "b h s e -> b (h s) e")
    y = rearrange(address, "b n h s -> b n (h s)") @ flat
    return y if share is not None else y / address.shape[2]


def takes_kernel(operation: str, query: Tensor, sharpness: Tensor | float, read: Tensor) -> bool:
    """Whether a kernel serves these arguments: something to read, in sizes and a dtype that have tiles.

    read: [… s k] or [… s e], the slots' table or the slots.
    """
    dtype, rows = torch.result_type(query, sharpness), tuple(read.shape[-2:])
    return bool(query.numel() and read.numel()) and has_tiles(operation, dtype, query.shape[-1], rows=rows)


def prepared(query: Tensor, table: Tensor, sharpness: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels take: query and table of the dtype that query * sharpness has, sharpness a tensor."""
    dtype = torch.result_type(query, sharpness)
    if not isinstance(sharpness, Tensor):
        sharpness = query.new_full((), sharpness, dtype=torch.promote_types(dtype, torch.float32))
    return query.to(dtype), table.to(dtype), sharpness


class Addresses(torch.autograd.Function):
    """softmax_s(query_h . table_hs), written book by book where the result is wanted, without a copy."""

    @staticmethod
    def forward(query: Tensor, table: Tensor) -> Tensor:
        b = query.shape[0]
        rows = rearrange(query, "b n h k -> (b n) h k")
        score = query.new_empty(rows.shape[0], *table.shape[:2])
        for book, addresses in enumerate(table):
            torch.mm(rows[:, book], addresses.T, out=score[:, book])
        return torch.softmax(rearrange(score, "(b n) h s -> b n h s", b=b), -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, table, address = ctx.saved_tensors
        inner = torch._softmax_backward_data(grad, address, -1, address.dtype)
        inner = rearrange(inner, "b n h s -> (b n) h s")
        rows = rearrange(query, "b n h k -> (b n) h k")
        grad_rows, grad_table = torch.empty_like(rows), torch.empty_like(table)
        for book, addresses in enumerate(table):
            torch.mm(inner[:, book], addresses, out=grad_rows[:, book])
            torch.mm(inner[:, book].T, rows[:, book], out=grad_table[book])
        return rearrange(grad_rows, "(b n) h k -> b n h k", b=query.shape[0]), grad_table
