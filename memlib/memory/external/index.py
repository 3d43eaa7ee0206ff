"""Nearest-neighbour indexes: FAISS's flat, IVF, IVF-PQ and HNSW behind one small face.

An index is a pure function of the vectors it covers, in their order: it is trained on a prefix whose
length depends on nothing but their number, and HNSW, whose graph depends on what is added together, takes
whole blocks of `BLOCK`. So it can be thrown away, saved or rebuilt at any time, and a copy of a store
answers exactly as the original does.

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

BLOCK = 64  # vectors that are added at once
LEAST = 256  # vectors that an index begins with and is first trained on


class SearchIndex:
    """An index over a growing sequence of vectors, of which it covers the first `size`."""

    def __init__(self, config: IndexConfig, dim: int) -> None:
        self.config, self.dim = config, dim
        self.faiss: Any = None
        self.trained_on = 0

    @property
    def size(self) -> int:
        return 0 if self.faiss is None else self.faiss.ntotal

    def cover(self, total: int, rows: Callable[[int, int], np.ndarray]) -> None:
        """Take in `total` vectors, HNSW their whole blocks; rows(start, stop) gives some: [m k] float32.

        An index that is trained (IVF) is trained on the first LEAST * 2^i vectors, as many as there are,
        and anew when i has grown: lists that fitted a thousand vectors serve a million badly.
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
        k: int,
        visible: np.ndarray | None = None,
        into: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places of the k best of each query among the covered, -1 for none: [n k] each.

        query: [n k] float32; visible: [size] bool, the places that may come back, or None for all;
        into: where to write the answer, float32 and int64.
        """
        selector = None if visible is None else select(visible)
        return self.faiss.search(query, k, params=self.parameters(k, selector), D=into[0], I=into[1])

    def parameters(self, k: int, selector: Any = None) -> Any:
        """How FAISS is to search for the k best."""
        faiss = library()
        if self.config.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(self.config.hnsw_ef_search, k), sel=selector)
        if self.config.kind == "ivf":
            return faiss.SearchParametersIVF(nprobe=self.config.ivf_probes, sel=selector)
        if self.config.kind == "ivfpq":
            return faiss.IVFPQSearchParameters(nprobe=self.config.ivf_probes, sel=selector)
        return faiss.SearchParameters(sel=selector)

    def to_bytes(self) -> np.ndarray:
        """The index as bytes, for a file."""
        faiss = library()
        return faiss.serialize_index(self.faiss)

    def from_bytes(self, data: np.ndarray, trained_on: int) -> None:
        """The inverse of `to_bytes`."""
        faiss = library()
        self.faiss, self.trained_on = faiss.deserialize_index(data), trained_on


def make_index(config: IndexConfig, dim: int, size: int) -> Any:
    """An empty FAISS index for inner products, its lists chosen for `size` vectors."""
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
    inverted.cp.min_points_per_centroid = 1  # small stores train on what there is, without a warning
    return inverted


def pq_parts(dim: int, wanted: int) -> int:
    """Bytes of a product-quantised vector: the largest divisor of dim that is at most `wanted`."""
    return max(parts for parts in range(1, min(wanted, dim) + 1) if dim % parts == 0)


def select(visible: np.ndarray) -> Any:
    """A FAISS selector for the true places: none where all are, a range where they touch, else a bitmap."""
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
    """Inner products of queries and the rows at their places, in float32; -inf where a place is -1.

    query: [h n k], rows: [r k], place: [h n j] -> [h n j]. FAISS reads each row where it lies: on a CPU,
    gathering them first takes three times as long.
    """
    faiss = library()
    product = np.empty(place.shape, np.float32)
    arrays = product, *(np.ascontiguousarray(t.numpy()) for t in (query, rows, place))
    pointers = (faiss.swig_ptr(array) for array in arrays)
    faiss.fvec_inner_products_by_idx(*pointers, rows.shape[-1], query[..., 0].numel(), place.shape[-1])
    return torch.from_numpy(product)


def library() -> Any:
    """FAISS, loaded when first needed; untyped, because its annotations are those of its C++."""
    import faiss

    return faiss
