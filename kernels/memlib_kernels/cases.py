"""Which kernels are compiled ahead of time, with which optional parts. A kernel of no case has no tiles.

To add one: write a function that launches it, and a Case in CASES. In an option, "odd" means lengths that are
no multiple of 16, and "width" a width between two of the table.
"""

from __future__ import annotations

import torch

from memlib_kernels.case import Case, meta, slot_tiles, small_tiles, square_tiles, whole_rows
from memlib_kernels.tiles import ANY


def narrower(width: int) -> int:
    """A width that takes the same row's tile: 48, 96 or 192 for 64, 128 or 256."""
    return width - width // 64 * 16


def attention(width: int, dtype: torch.dtype, option: str) -> None:
    """Both passes of attention. Two query heads share a key head."""
    from memlib_kernels.attention_kernel import backward, forward

    b, h, g, n, m = 2, 4, 2, 1024, 1024
    if "odd" in option:
        n, m = 509, 1021
    width = narrower(width) if "width" in option else width
    q, k, v = (meta(b, heads, rows, width, dtype=dtype) for heads, rows in ((h, n), (g, m), (g, m)))
    bias = valid = places = None
    window, causal = 0, True
    if "bias per key" in option:
        bias = meta(b, h, 1, m, dtype=dtype)
    if option == "bias per pair":
        bias = meta(b, h, n, m, dtype=dtype)
    if "valid" in option:
        valid, window = meta(b, m, dtype=torch.bool), 256
    if "places" in option:
        groups = n if "odd" in option else n // 64
        places, causal = meta(b, h, groups, 256, dtype=torch.int32), False
    scale = width**-0.5
    out, lse = forward(q, k, v, bias, valid, places, causal, window, scale)
    backward(out, lse, q, k, v, out, lse, bias, valid, places, causal, window, scale, bias is not None)


def addressed(width: int, dtype: torch.dtype, option: str) -> None:
    """Addresses and the read at them, both passes. width: of an address; slots have 128 numbers."""
    from memlib_kernels.addressed_kernel import read, read_backward, weights, weights_backward

    b, n, h, s, e = 2, 509 if "odd" in option else 512, 4, 1024, 128
    width = narrower(width) if "width" in option else width
    share = meta(b, n, h, dtype=dtype) if "share" in option else None
    query, table = meta(b, n, h, width, dtype=dtype), meta(h, s, width, dtype=dtype)
    slots, sharpness = meta(b, h, s, e, dtype=dtype), meta(1, dtype=torch.float32)
    address = weights(query, table, sharpness)
    weights_backward(address, query, table, sharpness, address)
    y, top, total = read(query, table, sharpness, slots, share)
    read_backward(y, query, table, sharpness, slots, share, top, total)


def gated_write(width: int, dtype: torch.dtype, option: str) -> None:
    """Both passes of gated_write. Whatever the tensors' dtype, products are of float32."""
    from memlib_kernels.gated_write_kernel import backward, forward

    b, n, s = 2, 509 if "odd" in option else 512, 1024
    slots = meta(b, s, width, dtype=torch.bfloat16 if option == "bfloat16" else dtype)
    of_tokens = dtype if option == "plain" else torch.bfloat16
    gate, values = meta(b, n, s, dtype=of_tokens), meta(b, n, width, dtype=of_tokens)
    backward(forward(slots, gate, gate, values), slots, gate, gate, values)


def quantized(width: int, dtype: torch.dtype, option: str) -> None:
    """Both passes of quantized_read over one bank for all rows and heads."""
    from memlib_kernels.quantized_kernel import backward, forward

    b, h, n, m = 2, 8, 512, 4096
    groups, mask = -(-width // 64), None
    if option == "8 bits, mask, width":
        groups, width, mask = 1, narrower(width), meta(n, m, dtype=torch.bool)
    q, scales = meta(b, h, n, width, dtype=dtype), meta(1, 1, m, groups, dtype=dtype)
    numbers = meta(1, 1, m, width, dtype=torch.int8)
    if option == "4 bits, bias":
        numbers, mask = meta(1, 1, m, width // 2, dtype=torch.uint8), meta(n, m, dtype=dtype)
    bank = (numbers, scales, numbers, scales)
    out, top, total = forward(q, *bank, mask, 0.1)
    backward(out, q, *bank, mask, out, top, total, 0.1, True)


def norm(width: int, dtype: torch.dtype, option: str) -> None:
    """Both passes of fused_norm: RMSNorm alone, or LayerNorm with all that is fused."""
    from memlib_kernels.norm_kernel import backward, forward

    x, weight = meta(1024, width, dtype=dtype), meta(width, dtype=dtype)
    bias = residual = None
    options = ("rms", 0.0, 0, "none", 1e-6)
    if option == "all parts":
        bias, residual, options = weight, x, ("layer", 0.1, 5, "silu", 1e-6)
    y, _ = forward(x, weight, bias, residual, *options)
    backward(y, residual, x, weight, bias, *options)


def merge(width: int, dtype: torch.dtype, option: str) -> None:
    """Both passes of merge."""
    from memlib_kernels.merge_kernel import backward, forward

    out, lse = meta(2, 4, 512, width, dtype=dtype), meta(2, 4, 512, dtype=torch.float32)
    backward(forward(out, lse, out, lse), out, lse, out, lse)


def silu_mul(width: int, dtype: torch.dtype, option: str) -> None:
    """Both passes of silu_mul."""
    from memlib_kernels.silu_mul_kernel import backward, forward

    x = meta(1024, 4096, dtype=dtype)
    backward(forward(x, x), x, x)


DENSE = ("bias per pair", "odd, valid, window", "odd, bias per key", "odd, width", "plain")
PLACES = ("odd, places, bias per key", "places")
ADDRESS = (16, 32, 64)
ODD = ("odd, width", "plain")
SHARE = ("odd, share, width", "plain")
WRITES = ("plain", "odd, bfloat16 tokens", "bfloat16")
FLOAT = ((torch.float32,),)
BITS = ("4 bits, bias", "8 bits, mask, width", "plain")
ROWS = tuple(2**i for i in range(4, 14))
PARTS = ("all parts", "plain")

CASES = (
    Case("attention_forward", attention, square_tiles("n"), (*DENSE, *PLACES)),
    Case("attention_backward_queries", attention, square_tiles("n"), (*DENSE, *PLACES)),
    Case("attention_backward_keys", attention, square_tiles("m"), DENSE),
    Case("attention_backward_slots", attention, slot_tiles, PLACES, False),
    Case("addressed_weights_forward", addressed, square_tiles("n"), ODD, widths=ADDRESS),
    Case("addressed_weights_backward_query", addressed, square_tiles("n"), ODD, widths=ADDRESS),
    Case("addressed_weights_backward_table", addressed, square_tiles("m"), ODD, widths=ADDRESS),
    Case("addressed_read_forward", addressed, square_tiles("n"), SHARE, widths=ADDRESS),
    Case("addressed_read_backward_query", addressed, square_tiles("n"), SHARE, widths=ADDRESS),
    Case("addressed_read_backward_table", addressed, square_tiles("m"), SHARE, widths=ADDRESS),
    Case("addressed_read_backward_slots", addressed, square_tiles("m"), SHARE, widths=ADDRESS),
    Case("gated_write_forward", gated_write, square_tiles("m"), WRITES, True, (16, 32, 64), FLOAT),
    Case("gated_write_later", gated_write, square_tiles("m"), WRITES, False, (ANY,), FLOAT),
    Case("gated_write_backward_slots", gated_write, square_tiles("m"), WRITES, True, (16, 32, 64), FLOAT),
    Case("gated_write_backward_values", gated_write, square_tiles("n"), WRITES, True, (16, 32, 64), FLOAT),
    Case("quantized_forward", quantized, square_tiles("n"), BITS),
    Case("quantized_backward_queries", quantized, square_tiles("n"), BITS),
    Case("quantized_backward_scales", quantized, square_tiles("m"), BITS),
    Case("norm_forward", norm, whole_rows, PARTS, False, ROWS),
    Case("norm_backward", norm, whole_rows, PARTS, False, ROWS),
    Case("merge_forward", merge, whole_rows, multiplies=False),
    Case("merge_backward", merge, whole_rows, multiplies=False),
    Case("silu_mul_forward", silu_mul, small_tiles, multiplies=False, widths=(ANY,)),
    Case("silu_mul_backward", silu_mul, small_tiles, multiplies=False, widths=(ANY,)),
)
