"""The operations of memory transformers: for each a reference, a CPU path and Triton kernels.

    from memlib_kernels import flash_attention
    out, lse = flash_attention(q, k, v, causal=True)

On a GPU an operation starts its Triton kernels, on a CPU torch computes it, and in float64 its reference.
Inside `with memlib_kernels.interpreter.interpreted():` the kernels run on CPU tensors.
"""

from memlib_kernels.addressed import addressed_read, addressed_weights
from memlib_kernels.attention import attention, attention_with_lse, flash_attention, merge
from memlib_kernels.gated_write import decaying_write, gated_write
from memlib_kernels.memory_attention import memory_attention, memory_attention_weights
from memlib_kernels.norm import fused_norm
from memlib_kernels.quantized import quantized_read
from memlib_kernels.rms_norm import rms_norm
from memlib_kernels.silu_mul import silu_mul

__all__ = [
    "addressed_read",
    "addressed_weights",
    "attention",
    "attention_with_lse",
    "decaying_write",
    "flash_attention",
    "fused_norm",
    "gated_write",
    "memory_attention",
    "memory_attention_weights",
    "merge",
    "quantized_read",
    "rms_norm",
    "silu_mul",
]
