"""The operations of memory transformers: for each a reference, a CPU path and Triton kernels."""
