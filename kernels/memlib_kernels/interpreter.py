"""Run kernels on CPU tensors, and record what each program reads, writes and multiplies.

    with interpreted() as record:
        out, lse = flash_attention(q, k, v, causal=True)

Triton ships an interpreter: NumPy does, tile by tile, what the GPU would, one program after another. It is
meant to be chosen by an environment variable before the import. Here it is chosen for a block of code, and
three things differ:

- a kernel stays a plain `@triton.jit` function: it can be interpreted and compiled in one process;
- bfloat16 is exact: numbers are widened to float32, and rounded to the nearest, ties to even. Triton's own
  interpreter computes with the bit patterns as if they were integers;
- every load, store and product can be recorded.

It uses private names of `triton.runtime.interpreter`: tests/kernels/test_interpreter.py says which release.
Not seen here: races (programs run in turn), and TF32 (products are exact).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.jit import JITFunction

from memlib_kernels.launch import INTERPRETER, Grid, Runner, using
from memlib_kernels.tiles import Tile

Builder: Any = triton_interpreter.InterpreterBuilder
new_handle: Any = triton_interpreter.TensorHandle
Handle = Any  # a tile's numbers and their type; Triton has no annotations


@dataclass(frozen=True)
class Access:
    """One load or store of a tile by one program.

    launch: which kernel launch, from 0; program: its place in the grid; kind: "load" or "store"; tensor: the
    argument's name; offsets: element offsets in it, one for each lane of the tile; mask: the lanes used;
    line: of the kernel's source.
    """

    launch: int
    program: Grid
    kind: str
    tensor: str
    offsets: np.ndarray
    mask: np.ndarray
    itemsize: int
    line: int

    @property
    def bytes(self) -> int:
        return int(self.mask.sum()) * self.itemsize


@dataclass(frozen=True)
class Product:
    """One matrix product of one program, [m k] by [k n]. accesses: how many the record held before it."""

    launch: int
    program: Grid
    m: int
    k: int
    n: int
    accesses: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


@dataclass
class Record:
    """What interpreted launches did. launches: (kernel's name, grid), in order; sizes: (launch, tensor's
    name) -> its number of elements; exponentials: how many each launch takes, masked lanes included."""

    launches: list[tuple[str, Grid]] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    sizes: dict[tuple[int, str], int] = field(default_factory=dict)
    exponentials: dict[int, int] = field(default_factory=dict)

    def of(self, launch: int) -> Record:
        """What one launch did."""
        return replace(
            self,
            accesses=[access for access in self.accesses if access.launch == launch],
            products=[product for product in self.products if product.launch == launch],
            exponentials={launch: self.exponentials.get(launch, 0)},
        )

    def bytes(self, kind: str | None = None) -> int:
        """Bytes that all programs load ("load"), store ("store"), or both."""
        return sum(access.bytes for access in self.accesses if kind in (None, access.kind))

    def flops(self) -> int:
        """Floating-point operations of all matrix products, those of masked lanes included."""
        return sum(product.flops for product in self.products)

    def written_twice(self) -> list[tuple[str, str]]:
        """(kernel, tensor) where two programs of a launch store the same element: a race on a GPU."""
        owners: dict[tuple[int, str], dict[int, Grid]] = {}
        raced: dict[tuple[str, str], None] = {}
        for access in self.accesses:
            if access.kind == "store":
                seen = owners.setdefault((access.launch, access.tensor), {})
                for offset in access.offsets[access.mask].tolist():
                    if seen.setdefault(offset, access.program) != access.program:
                        raced[self.launches[access.launch][0], access.tensor] = None
        return list(raced)

    def unique_bytes(self, kind: str) -> int:
        """Bytes loaded or stored, each element counted once for each launch."""
        seen: dict[tuple[int, str], set[int]] = {}
        itemsize: dict[tuple[int, str], int] = {}
        for access in self.accesses:
            if access.kind == kind:
                key = (access.launch, access.tensor)
                seen.setdefault(key, set()).update(access.offsets[access.mask].tolist())
                itemsize[key] = access.itemsize
        return sum(len(offsets) * itemsize[key] for key, offsets in seen.items())


@contextmanager
def interpreted(block: int | Tile | None = 16, record: bool = False) -> Iterator[Record]:
    """Execute this package's kernels on CPU tensors inside this block, and yield what they did.

    block: the side of all tiles, a power of two, or their Tile; None for the table's. record: also keep every
    load, store and product, which is slow: for small inputs.
    """
    kept = Record()
    tile = Tile(block, block) if isinstance(block, int) else block

    def run(kernel: JITFunction, grid: Grid, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        kept.launches.append((kernel.fn.__name__, grid))
        interpret(kernel, grid, args, constants, kept if record else None)

    with using(Runner(run, INTERPRETER, tile)):
        yield kept


def interpret(
    kernel: JITFunction,
    grid: Grid,
    args: Sequence[Any],
    constants: dict[str, Any],
    record: Record | None = None,
) -> None:
    """Run one launch, program after program. A kernel's own exception passes through."""
    names = kernel.arg_names
    unknown = constants.keys() - {*names, "num_warps", "num_stages"}
    if unknown:
        raise TypeError(f"{kernel.fn.__name__} has no argument {', '.join(sorted(unknown))}")
    constants = {name: value for name, value in constants.items() if name in names}
    given = dict(zip(names, args, strict=False)) | constants
    missing = [name for name in names if name not in given]
    if missing:
        raise TypeError(f"{kernel.fn.__name__} is launched without {', '.join(missing)}")
    constexprs = {names[i] for i in kernel.constexprs}
    builder = triton_interpreter.interpreter_builder
    full = (*grid, 1, 1)[:3]
    with patched(builder, given, record):
        values = {
            name: value if name in constexprs or value is None else triton_interpreter._implicit_cvt(value)
            for name, value in given.items()
        }
        function = as_python(kernel)
        builder.set_grid_dim(*full)
        for index in np.ndindex(*full):
            builder.set_grid_idx(*index)
            function(**values)


def as_python(kernel: JITFunction) -> Callable[..., Any]:
    """A kernel's function, its assignments rewritten as Triton's interpreter needs them."""
    return triton_interpreter.InterpretedFunction(kernel.fn).rewrite()


@contextmanager
def patched(builder: Any, given: dict[str, Any], record: Record | None) -> Iterator[None]:
    """Replace Triton's language by the interpreter's, kernels that call kernels and bfloat16 included."""
    scope = triton_interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    exact = ExactBuilder(builder, given, record)
    scope.set_attr(JITFunction, "__call__", lambda self, *args, **kwargs: as_python(self)(*args, **kwargs))
    for name in REPLACED:
        scope.set_attr(builder, name, getattr(exact, name))
    # NumPy's own warnings say nothing here: exp2(-inf) and 0/0 of masked lanes are meant.
    scope.set_attr(builder, "options", triton_interpreter.InterpreterOptions(sanitize_overflow=False))
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        scope.restore()


def widened(handle: Handle) -> np.ndarray:
    """A tile's numbers, bfloat16 as float32."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def rounded(data: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, near).astype(np.uint16)


REPLACED = (
    "get_bf16",
    "cast_impl",
    "create_fp_to_fp",
    "binary_op",
    "unary_op",
    "create_fma",
    "create_dot",
    "create_masked_load",
    "create_masked_store",
)


class ExactBuilder:
    """What replaces parts of Triton's `InterpreterBuilder`: exact bfloat16, and the record."""

    def __init__(self, builder: Any, given: dict[str, Any], record: Record | None) -> None:
        self.builder, self.record = builder, record
        self.launch = 0
        self.ranges: list[tuple[int, int, str, int]] = []
        if record is not None:
            self.launch = len(record.launches) - 1
            for name, value in given.items():
                if isinstance(value, Tensor) and value.numel():
                    count = value.untyped_storage().nbytes() // value.element_size()
                    first = value.untyped_storage().data_ptr()
                    self.ranges.append((first, first + value.untyped_storage().nbytes(), name, count))
                    record.sizes[self.launch, name] = value.numel()

    def get_bf16(self, value: float) -> Handle:
        return new_handle(rounded(np.array([value])), tl.bfloat16)

    def cast_impl(self, handle: Handle, kind: Any) -> Handle:
        kind = kind.scalar
        data = widened(handle)
        if kind == tl.bfloat16:
            return new_handle(rounded(data.astype(np.float32)), kind)
        return new_handle(data.astype(triton_interpreter._get_np_dtype(kind)), kind)

    def create_fp_to_fp(self, handle: Handle, kind: Any, rounding_mode: Any) -> Handle:
        return self.cast_impl(handle, kind)

    def binary_op(self, lhs: Handle, rhs: Handle, operation: Any) -> Handle:
        return self.typed(operation(widened(lhs), widened(rhs)), lhs.dtype.scalar)

    def unary_op(self, handle: Handle, operation: Any) -> Handle:
        if self.record is not None and operation in (np.exp, np.exp2):
            counted = self.record.exponentials
            counted[self.launch] = counted.get(self.launch, 0) + widened(handle).size
        return self.typed(operation(widened(handle)), handle.dtype.scalar)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        return self.typed(widened(x) * widened(y) + widened(z), z.dtype.scalar)

    def typed(self, data: np.ndarray, kind: Any) -> Handle:
        """Numbers as a tile of one kind; comparisons stay boolean, as in Triton's own builder."""
        if data.dtype == np.bool_:
            return new_handle(data, kind)
        if kind == tl.bfloat16:
            return new_handle(rounded(data), kind)
        wanted = triton_interpreter._get_np_dtype(kind)
        too_wide = data.itemsize * 8 > max(kind.primitive_bitwidth, 8)
        return new_handle(data.astype(wanted) if too_wide else data, kind)

    def create_dot(self, a: Handle, b: Handle, c: Handle, input_precision: Any, imprecise: Any) -> Handle:
        left, right = widened(a), widened(b)
        if self.record is not None:
            (m, k), n = left.shape[-2:], right.shape[-1]
            before = len(self.record.accesses)
            self.record.products.append(Product(self.launch, self.builder.grid_idx, m, k, n, before))
        return new_handle(np.matmul(left, right, dtype=c.data.dtype) + c.data, c.dtype.scalar)

    def create_masked_load(
        self, pointers: Handle, mask: Handle, other: Handle | None, cache: Any, eviction: Any, volatile: Any
    ) -> Handle:
        self.note("load", pointers, mask)
        return Builder.create_masked_load(self.builder, pointers, mask, other, cache, eviction, volatile)

    def create_masked_store(
        self, pointers: Handle, value: Handle, mask: Handle, cache: Any, eviction: Any
    ) -> None:
        self.note("store", pointers, mask)
        Builder.create_masked_store(self.builder, pointers, value, mask, cache, eviction)

    def note(self, kind: str, pointers: Handle, mask: Handle) -> None:
        """Add an access to the record. Raises IndexError if a lane in use is outside every tensor."""
        if self.record is None:
            return
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        address = np.asarray(pointers.data, dtype=np.uint64)
        used = np.broadcast_to(np.asarray(mask.data, dtype=bool), address.shape)
        if not used.any():
            return
        low = int(address[used].min())
        holds = [found for found in self.ranges if found[0] <= low < found[1]]
        if not holds:
            raise IndexError(f"a {kind} at address {low}: no argument of this kernel lies there")
        first, _, name, count = holds[0]
        offsets = (address.astype(np.int64) - first) // itemsize
        if not (offsets[used].min() >= 0 and offsets[used].max() < count):
            raise IndexError(
                f"a {kind} at offset {offsets[used].max()} of {name}, which has {count} elements"
            )
        self.record.accesses.append(
            Access(self.launch, self.builder.grid_idx, kind, name, offsets, used, itemsize, self.line())
        )

    def line(self) -> int:
        """The line of the kernel's source that is being executed."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
            ("triton", __name__)
        ):
            frame = frame.f_back
        return frame.f_lineno
