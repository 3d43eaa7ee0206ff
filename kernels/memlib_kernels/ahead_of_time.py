"""Compile kernels for a GPU that need not be here, and read the compiler's report of each.

    with compile_only("sm_90") as compiled:
        flash_attention(q, k, v, causal=True)  # CPU tensors; a *_kernel.py takes meta tensors too
    print(compiled[0].report())

Triton contains the compilers of both makers. The launch code runs as on a GPU, and Triton specialises each
kernel to its arguments as on a GPU (dtypes, numbers and addresses divisible by 16, numbers equal to 1). Then
nothing is started.

A report says what costs speed without failing a test of results: registers that spill to memory, and matrix
products that fall back to a slower instruction. It says nothing about time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from memlib_kernels.launch import Grid, Runner, using
from memlib_kernels.tiles import Tile

# Bytes of shared memory (AMD: LDS) that one program may use. CUDA C Programming Guide, table of compute
# capabilities; AMD CDNA 3 and CDNA 4 instruction set references.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}

# Columns of tensor memory that one program may use, where a GPU has it: sm_100 keeps products there. Triton
# compiles a kernel that needs more to one instruction, a trap.
TENSOR_MEMORY_LIMIT = 512

# The matrix instruction that each GPU was built for. Older ones still run, at half the speed and less.
OWN_PRODUCT = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma", "gfx950": "mfma"}

# Rows that one of these instructions multiplies at least. A smaller tile is multiplied by an older one.
LEAST_SIDE = {"wgmma": 64, "tcgen05": 64}

PRODUCTS = {
    "mma.sync": r"\bmma\.sync\.aligned\.m\d+n\d+k\d+\.row\.col\.(?:satfinite\.)?\w+\.(\w+)",
    "wgmma": r"\bwgmma\.mma_async\.sync\.aligned\.m\d+n\d+k\d+\.\w+\.(\w+)",
    "tcgen05": r"\btcgen05\.mma\.cta_group::\d\.kind::(\w+)",
    "mfma": r"\bv_mfma_\w+?_\d+x\d+x\d+_?(bf16|f16|f32|xf32|i8|\w+)",
}


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel.

    registers: of a thread, at most 255 on NVIDIA, 512 on AMD; spills: bytes of a thread's memory for values
    that found no register; shared: bytes of shared memory of a program; product: matrix instructions and the
    dtype of their operands, as "wgmma bf16", or "none"; tensor_memory: its columns on sm_100; scalar_spills:
    AMD's scalar registers that are kept in lanes of vector registers, which costs a move, not memory.
    """

    registers: int
    spills: int
    shared: int
    product: str
    tensor_memory: int = 0
    scalar_spills: int = 0

    def to_json(self) -> dict[str, Any]:
        """The figures by name, the last two only where they are not 0."""
        optional = ("tensor_memory", "scalar_spills")
        return {name: value for name, value in asdict(self).items() if value or name not in optional}

    def problems(self, target: str, products: tuple[str, ...]) -> list[str]:
        """What is wrong with a kernel for this target whose matrix instruction may be one of `products`."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes of registers in each thread")
        if self.shared > SHARED_LIMIT[target]:
            found.append(f"needs {self.shared} bytes of shared memory; {target} has {SHARED_LIMIT[target]}")
        if self.tensor_memory > TENSOR_MEMORY_LIMIT:
            found.append(f"needs {self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY_LIMIT}")
        if self.product.split(" ")[0] not in products or "+" in self.product:
            found.append(f"multiplies by {self.product}, not by {' or '.join(products)}")
        return found


@dataclass(frozen=True)
class Compiled:
    """One kernel as a launch compiled it. binary: Triton's, its texts in `binary.asm`."""

    name: str
    target: str
    binary: Any

    def report(self) -> Report:
        """Read the machine code's own figures."""
        asm, shared = self.binary.asm, int(self.binary.metadata.shared)
        if "amdgcn" in asm:
            text = asm["amdgcn"]
            spilled = max(4 * figure("vgpr_spill_count", text), figure("private_segment_fixed_size", text))
            registers, scalar = figure("vgpr_count", text), figure("sgpr_spill_count", text)
            return Report(registers, spilled, shared, products_of(text), scalar_spills=scalar)
        usage = resource_usage(asm["cubin"])
        spilled = usage["STACK"] + usage["LOCAL"]
        columns = int(getattr(self.binary.metadata, "tmem_size", 0) or 0)
        return Report(usage["REG"], spilled, shared, products_of(asm["ptx"]), columns)


def figure(name: str, text: str) -> int:
    """A figure of the kernel's metadata in AMD's assembly."""
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise ValueError(f"the assembly has no .{name}: this release of LLVM writes it otherwise")
    return int(found[1])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, … of NVIDIA's machine code, by the cuobjdump that Triton contains."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def products_of(text: str) -> str:
    """The matrix instructions of PTX or AMD's assembly with their operands' dtypes, or "none"."""
    found = {f"{name} {kind}" for name, pattern in PRODUCTS.items() for kind in re.findall(pattern, text)}
    return " + ".join(sorted(found)) or "none"


class CompileOnlyDriver:
    """What Triton's launch code asks of a driver before it compiles: one device, named as its target."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if self.target.startswith("sm_"):
            return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.target, 64)


@contextmanager
def compile_only(target: str, tile: Tile | None = None, only: str | None = None) -> Iterator[list[Compiled]]:
    """Compile the kernels that are launched inside this block, start none, and yield them in order.

    target: a key of SHARED_LIMIT. tile: the tile of all kernels; None for the table's. only: the name of the
    one kernel to compile. Raises ValueError for an unknown target. Not for several threads at a time: the
    driver is Triton's one.
    """
    if target not in SHARED_LIMIT:
        raise ValueError(f"target {target!r}: must be one of {', '.join(SHARED_LIMIT)}")
    compiled: list[Compiled] = []
    kernels: list[Any] = []

    def run(kernel: Any, grid: Grid, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        name = kernel.fn.__name__
        if only in (None, name):
            kernels.append(kernel)
            compiled.append(Compiled(name, target, kernel.warmup(*args, grid=grid, **constants)))

    before = driver._active
    driver.set_active(CompileOnlyDriver(target))
    try:
        with using(Runner(run, target, tile)):
            yield compiled
    finally:
        driver.set_active(before)
        for kernel in kernels:
            kernel.device_caches.pop(target, None)


@contextmanager
def own_cache() -> Iterator[None]:
    """Let Triton keep what it compiles in a temporary folder, not in the user's."""
    with tempfile.TemporaryDirectory(prefix="memlib-triton-") as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def allowed_products(target: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Matrix instructions that a kernel with products may use, the best first.

    Half precision: the target's own. float32 on NVIDIA is made of three TF32 products (tf32x3), whose tiles
    may be too small for the newest instruction: mma.sync then. On AMD mfma multiplies float32 itself.
    """
    own = OWN_PRODUCT[target]
    return (own, "mma.sync") if dtype == torch.float32 and own in ("wgmma", "tcgen05") else (own,)
