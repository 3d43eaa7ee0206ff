"""The computations that memories share: pure functions of tensors.

Each function `name` has a reference `name_reference` in the same file, written with plain torch and einops:
same arguments, same answer. Only the implementation behind a name changes with device and mode.
"""

from memlib.ops.mix import mix, mix_reference
from memlib.ops.rolling import (
    newest_tokens,
    newest_tokens_reference,
    rolling_mean,
    rolling_mean_reference,
)
from memlib.ops.rotary import rotate, rotate_reference
from memlib.ops.rows import put_rows, put_rows_reference, take_rows, take_rows_reference
from memlib.ops.search import (
    TIE,
    chunk_places,
    exact_search,
    exact_search_reference,
    nearest,
    nearest_reference,
)
from memlib.ops.token_shift import shifted, token_shift, token_shift_reference
from memlib_kernels.addressed import (
    addressed_read,
    addressed_read_reference,
    addressed_weights,
    addressed_weights_reference,
    read_at,
)
from memlib_kernels.attention import (
    attention,
    attention_reference,
    attention_with_lse,
    attention_with_lse_reference,
    flash_attention,
    flash_attention_reference,
    merge,
    merge_reference,
    merge_weight,
    softmax_or_zero,
)
from memlib_kernels.gated_write import (
    decaying_write,
    decaying_write_reference,
    gated_write,
    gated_write_reference,
)
from memlib_kernels.memory_attention import (
    memory_attention,
    memory_attention_reference,
    memory_attention_weights,
)
from memlib_kernels.norm import fused_norm, fused_norm_reference
from memlib_kernels.quantized import (
    dequantize,
    dequantize_reference,
    quantized_read,
    quantized_read_reference,
)
from memlib_kernels.rms_norm import rms_norm, rms_norm_reference
from memlib_kernels.selected import (
    selected_scores,
    selected_scores_reference,
    selected_sum,
    selected_sum_reference,
    top_index,
)
from memlib_kernels.silu_mul import silu_mul, silu_mul_reference

__all__ = [
    "TIE",
    "addressed_read",
    "addressed_read_reference",
    "addressed_weights",
    "addressed_weights_reference",
    "attention",
    "attention_reference",
    "attention_with_lse",
    "attention_with_lse_reference",
    "chunk_places",
    "decaying_write",
    "decaying_write_reference",
    "dequantize",
    "dequantize_reference",
    "exact_search",
    "exact_search_reference",
    "flash_attention",
    "flash_attention_reference",
    "fused_norm",
    "fused_norm_reference",
    "gated_write",
    "gated_write_reference",
    "memory_attention",
    "memory_attention_reference",
    "memory_attention_weights",
    "merge",
    "merge_reference",
    "merge_weight",
    "mix",
    "mix_reference",
    "nearest",
    "nearest_reference",
    "newest_tokens",
    "newest_tokens_reference",
    "put_rows",
    "put_rows_reference",
    "quantized_read",
    "quantized_read_reference",
    "read_at",
    "rms_norm",
    "rms_norm_reference",
    "rolling_mean",
    "rolling_mean_reference",
    "rotate",
    "rotate_reference",
    "selected_scores",
    "selected_scores_reference",
    "selected_sum",
    "selected_sum_reference",
    "shifted",
    "silu_mul",
    "silu_mul_reference",
    "softmax_or_zero",
    "take_rows",
    "take_rows_reference",
    "token_shift",
    "token_shift_reference",
    "top_index",
]
