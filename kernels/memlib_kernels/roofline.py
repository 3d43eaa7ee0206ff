"""The least time that each kernel could take on three GPUs, on paper.

    python -m memlib_kernels.roofline        print the tables, as Markdown

A GPU moves bytes from and to its memory, multiplies matrices and takes exponentials, at the same time. So a
kernel needs at least

    floor = max(bytes / bandwidth, flops / peak of products, exponentials / rate)

where each tensor is moved once, and only queries and keys that see each other are counted. A real kernel is
slower: FlashAttention 3 reports 75 % of the H100's peak of products (arXiv 2407.08608), tiles are half empty
along the causal diagonal, and widened numbers cost instructions that are not counted here. **No time in this
module was measured.**

Peaks, dense, without sparsity:

- A100 SXM 80 GB: 312 TFLOP/s in bfloat16, 156 in TF32, 2.039 TB/s (NVIDIA A100 data sheet, 2021); 108
  multiprocessors at 1.41 GHz, each 16 exponentials a cycle (CUDA C Programming Guide, "Arithmetic
  Instructions").
- H100 SXM: 989 TFLOP/s in bfloat16, 495 in TF32, 3.35 TB/s (NVIDIA H100 data sheet, 2023); 3.9 T
  exponentials/s (Shah et al. 2024, arXiv 2407.08608, section 2.2).
- MI300X: 1307 TFLOP/s in bfloat16, 163 in float32, 5.3 TB/s (AMD MI300X data sheet, 2023). AMD states no rate
  of exponentials: assumed is a quarter of the lanes of 304 compute units, 16 a cycle each, at 2.1 GHz.

float32 products are three TF32 products on NVIDIA (tf32x3), so their peak is a third of TF32's.
Source of the model: Williams et al. 2009, doi 10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memlib_kernels.traffic import Attention, Work


@dataclass(frozen=True)
class Gpu:
    """Peaks in a second: products of bfloat16 and of float32 in FLOP, bandwidth in bytes, exponentials."""

    name: str
    products: float
    products_float32: float
    bandwidth: float
    exponentials: float

    def times(self, work: Work, float32: bool = False) -> dict[str, float]:
        """Seconds that each part of the work needs on its own."""
        return {
            "memory": work.bytes / self.bandwidth,
            "products": work.flops / (self.products_float32 if float32 else self.products),
            "exponentials": work.exponentials / self.exponentials,
        }


GPUS = (
    Gpu("A100", 312e12, 156e12 / 3, 2.039e12, 108 * 16 * 1.41e9),
    Gpu("H100", 989e12, 495e12 / 3, 3.35e12, 3.9e12),
    Gpu("MI300X", 1307e12, 163e12, 5.3e12, 304 * 16 * 2.1e9),
)


@dataclass(frozen=True)
class Model:
    """One layer. d: width, hidden: of the MLP; h, g: query and key heads; n: tokens of each of b streams;
    slots: of a memory, for each stream; segment: tokens that read and write it at once."""

    name: str
    d: int
    hidden: int
    h: int
    g: int
    b: int
    n: int
    slots: int
    segment: int = 512

    def attention(self) -> Attention:
        width = self.d // self.h
        return Attention(self.b, self.h, self.g, self.n, self.n, width, width, causal=True)

    def read(self, tokens: int) -> Attention:
        """So many tokens of each stream read all its slots; a slot has a bias of two bytes."""
        return replace(self.attention(), n=tokens, m=self.slots, causal=False, per_key=2)


MODELS = (
    Model("small", d=512, hidden=1536, h=8, g=8, b=8, n=2048, slots=1024),
    Model("medium", d=2048, hidden=5632, h=16, g=16, b=4, n=4096, slots=4096),
    Model("7B", d=4096, hidden=14336, h=32, g=8, b=1, n=8192, slots=16384),
)


def rows_moved(sizes: Attention, query_numbers: int, key_numbers: int, wide: int) -> tuple[int, int]:
    """Bytes of so many numbers for each query and head, and each key and head. wide: float32 for a query."""
    queries = sizes.b * sizes.h * sizes.n * (query_numbers * sizes.itemsize + wide * sizes.wide)
    return queries, sizes.b * sizes.g * sizes.m * key_numbers * sizes.itemsize


def attention_forward(sizes: Attention) -> Work:
    k, e, pairs = sizes.k, sizes.e, sizes.b * sizes.h * sizes.pairs()
    loaded = sum(rows_moved(sizes, k, k + e, 0)) + sizes.b * sizes.g * sizes.m * sizes.per_key
    return Work(loaded, sum(rows_moved(sizes, e, 0, 1)), 2 * pairs * (k + e), pairs)


def attention_backward_queries(sizes: Attention) -> Work:
    k, e, pairs = sizes.k, sizes.e, sizes.b * sizes.h * sizes.pairs()
    loaded = sum(rows_moved(sizes, k + 2 * e, k + e, 2))
    return Work(loaded, sum(rows_moved(sizes, k, 0, 1)), 2 * pairs * (2 * k + e), pairs)


def attention_backward_keys(sizes: Attention) -> Work:
    k, e, pairs = sizes.k, sizes.e, sizes.b * sizes.h * sizes.pairs()
    loaded = sum(rows_moved(sizes, k + e, k + e, 2))
    return Work(loaded, sum(rows_moved(sizes, 0, k + e, 0)), 2 * pairs * 2 * (k + e), pairs)


def quantized_read(sizes: Attention, bits: int) -> Work:
    """The keys and values in so many bits, with a float32 scale for each of their rows."""
    work = attention_forward(sizes)
    numbers = sizes.b * sizes.g * sizes.m
    saved = numbers * ((sizes.k + sizes.e) * (8 * sizes.itemsize - bits) // 8 - 2 * 4)
    return replace(work, loaded=work.loaded - saved)


def rowwise(loads: int, stores: int, width: int, model: Model) -> Work:
    """A kernel that loads and stores so many bfloat16 numbers for each feature of a token."""
    numbers = model.b * model.n * width
    return Work(2 * loads * numbers, 2 * stores * numbers)


def gated_write(model: Model) -> Work:
    """A segment's tokens written to all slots of their stream, in float32: slots as wide as the model."""
    slots = model.b * model.slots
    tokens = model.b * model.segment
    loaded = 4 * (slots * model.d + tokens * (2 * model.slots + model.d))
    return Work(loaded, 4 * slots * model.d, 2 * tokens * model.slots * model.d)


KERNELS: dict[str, Callable[[Model], Work]] = {
    "attention_forward": lambda model: attention_forward(model.attention()),
    "attention_backward_queries": lambda model: attention_backward_queries(model.attention()),
    "attention_backward_keys": lambda model: attention_backward_keys(model.attention()),
    "a segment reads slots, 16 bits": lambda model: attention_forward(model.read(model.segment)),
    "a segment reads slots, 8 bits": lambda model: quantized_read(model.read(model.segment), 8),
    "one token reads slots, 16 bits": lambda model: attention_forward(model.read(1)),
    "one token reads slots, 8 bits": lambda model: quantized_read(model.read(1), 8),
    "one token reads slots, 4 bits": lambda model: quantized_read(model.read(1), 4),
    "gated_write_forward": gated_write,
    "merge_forward": lambda model: rowwise(2, 1, model.d, model),
    "norm_forward with a residual": lambda model: rowwise(2, 2, model.d, model),
    "silu_mul_forward": lambda model: rowwise(2, 1, model.hidden, model),
}
FLOAT32 = {"gated_write_forward"}


def floors() -> str:
    """A row for each model and kernel: its work, and each GPU's floor in µs with what bounds it."""
    head = ["model", "kernel", "MB", "GFLOP", "10⁶ exp", "FLOP/byte", *(gpu.name for gpu in GPUS)]
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for model in MODELS:
        for name, work_of in KERNELS.items():
            work = work_of(model)
            figures = work.bytes / 1e6, work.flops / 1e9, work.exponentials / 1e6, work.flops / work.bytes
            row = [model.name, name, *map(short, figures)]
            for gpu in GPUS:
                times = gpu.times(work, name in FLOAT32)
                bound = max(times, key=lambda part: times[part])
                row.append(f"{short(1e6 * times[bound])} {bound}")
            rows.append(row)
    return markdown(rows)


def rows_bound_by_memory(gpu: Gpu, width: int, bits: int) -> int:
    """Up to how many rows of queries for one bank of keys and values a read waits for memory.

    With R rows (queries times heads that share the bank), a slot is moved once, and multiplied and raised R
    times: memory is the longest part while R < this. Fewer bits help only then.
    """
    slot = 2 * width * bits / 8 / gpu.bandwidth
    row = max(2 * 2 * width / gpu.products, 1 / gpu.exponentials)
    return int(slot / row)


def break_even() -> str:
    """`rows_bound_by_memory` for widths and bits."""
    rows = [["GPU", "width", "16 bits", "8 bits", "4 bits"], ["---", "---:", "---:", "---:", "---:"]]
    for gpu in GPUS:
        for width in (64, 128):
            found = [str(rows_bound_by_memory(gpu, width, bits)) for bits in (16, 8, 4)]
            rows.append([gpu.name, str(width), *found])
    return markdown(rows)


def short(figure: float) -> str:
    """Three digits, or all before the point."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(floors() + "\n\n" + break_even())
