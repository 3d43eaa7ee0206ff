"""Nearest-neighbour indexes: FAISS's flat, IVF, IVF-PQ and HNSW behind one interface.

An index is a pure function of the vectors it covers, in their order: it is trained on a prefix, the length
of which depends only on their number, and HNSW adds whole blocks of `BLOCK` vectors, because its graph
depends on the grouping. So an index can be deleted, saved or rebuilt at any time, and a copy of a store
returns exactly the same hits.

Axes: h heads, n queries, m vectors, r rows, j hits, k width.

All indexes search by inner product. Source: Johnson et al. 2017, arXiv 1702.08734 (FAISS); Malkov and
Yashunin 2016, arXiv 1603.09320 (HNSW); Jégou et al. 2011 (product quantisation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlib.config import IndexConfig

BLOCK = 64  # vectors added at once
LEAST = 256  # minimum number of vectors of an index, used for its first training


class SearchIndex:
    """An index over the first `size` vectors of a growing sequence."""

    def __init__(self, config: IndexConfig, dim: int) -> None:
        self.config, self.dim = config, dim
        self.faiss: Any = None
        self.trained_on = 0

    @property
    def size(self) -> int:
        return 0 if self.faiss is None else self.faiss.ntotal

    def cover(self, total: int, rows: Callable[[int, int], np.ndarray]) -> None:
        """Extend the index to `total` vectors (HNSW: whole blocks); rows(start, stop): [m k] float32.

        IVF indexes are trained on the first LEAST * 2^i vectors for the largest possible i, and retrained
        when i grows: lists trained on a thousand vectors are poor for a million.
        """
        end = total // BLOCK * BLOCK if self.config.kind == "hnsw" else total
        if end < LEAST or end <= self.size:
            return
        wanted = LEAST << (end // LEAST).bit_length() - 1
        if self.faiss is None or (self.config.kind in ("ivf", "ivfpq") and self.trained_on != wanted):
            self.faiss, self.trained_on = make_index(self.config, self.dim, wanted), wanted
            self.faiss.train(rows(0, wanted))
        for start in range(self.size, end, BLOCK):
            self.faiss.add(rows(start, min(start + BLOCK, end)))

    def search(
        self,
        query: np.ndarray,
        count: int,
        visible: np.ndarray | None = None,
        into: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and indices of the `count` best covered vectors of each query, -1 for none: [n j] each.

        query: [n k] float32; visible: [size] bool, vectors that may be retrieved, or None for all; into:
        output arrays, float32 and int64.
        """
        selector = None if visible is None else select(visible)
        return self.faiss.search(query, count, params=self.parameters(count, selector), D=into[0], I=into[1])

    def parameters(self, count: int, selector: Any = None) -> Any:
        """FAISS's search parameters for the `count` best."""
        faiss = library()
        if self.config.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(self.config.hnsw_ef_search, count), sel=selector)
        if self.config.kind == "ivf":
            return faiss.SearchParametersIVF(nprobe=self.config.ivf_probes, sel=selector)
        if self.config.kind == "ivfpq":
            return faiss.IVFPQSearchParameters(nprobe=self.config.ivf_probes, sel=selector)
        return faiss.SearchParameters(sel=selector)

    def to_bytes(self) -> np.ndarray:
        """Serialise the index."""
        faiss = library()
        return faiss.serialize_index(self.faiss)

    def from_bytes(self, data: np.ndarray, trained_on: int) -> None:
        """The inverse of `to_bytes`."""
        faiss = library()
        self.faiss, self.trained_on = faiss.deserialize_index(data), trained_on


def make_index(config: IndexConfig, dim: int, size: int) -> Any:
    """An empty FAISS index for inner products; the number of IVF lists suits `size` vectors."""
    faiss = library()
    metric = faiss.METRIC_INNER_PRODUCT
    if config.kind == "flat":
        return faiss.IndexFlatIP(dim)
    if config.kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, config.hnsw_links, metric)
        index.hnsw.efConstruction = config.hnsw_ef_construction
        return index
    lists = max(1, int(config.ivf_lists_per_root * size**0.5))
    quantizer = faiss.IndexFlatIP(dim)
    if config.kind == "ivf":
        inverted = faiss.IndexIVFFlat(quantizer, dim, lists, metric)
    else:
        inverted = faiss.IndexIVFPQ(quantizer, dim, lists, pq_parts(dim, config.pq_bytes), 8, metric)
        inverted.pq.cp.min_points_per_centroid = 1
    inverted.cp.min_points_per_centroid = 1  # no warning when a small store has few training vectors
    return inverted


def pq_parts(dim: int, wanted: int) -> int:
    """Bytes of a product-quantised vector: the largest divisor of dim that is at most `wanted`."""
    return max(parts for parts in range(1, min(wanted, dim) + 1) if dim % parts == 0)


def select(visible: np.ndarray) -> Any:
    """A FAISS selector for visible rows: None if all are, a range if they are contiguous, else a bitmap."""
    faiss = library()
    places = np.flatnonzero(visible)
    if len(places) == len(visible):
        return None
    if not len(places):
        return faiss.IDSelectorRange(0, 0)
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places):
        return faiss.IDSelectorRange(first, last + 1)
    return faiss.IDSelectorBitmap(np.packbits(visible, bitorder="little"))


def products_at(query: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """Inner products of queries with the rows at given indices, in float32; -inf at index -1.

    query: [h n k], rows: [r k], place: [h n j] -> [h n j]. FAISS reads the rows in place: on a CPU, gathering
    them first takes three times as long.
    """
    faiss = library()
    product = np.empty(place.shape, np.float32)
    arrays = product, *(np.ascontiguousarray(t.numpy()) for t in (query, rows, place))
    pointers = (faiss.swig_ptr(array) for array in arrays)
    faiss.fvec_inner_products_by_idx(*pointers, rows.shape[-1], query[..., 0].numel(), place.shape[-1])
    return torch.from_numpy(product)


def library() -> Any:
    """The faiss module, imported on first use; untyped, because its Python functions lack annotations."""
    import faiss

    return faiss
