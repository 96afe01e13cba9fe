"""Compression: N:M sparsity by ADMM, low-bit quantization by straight-through training, and the search that mixes them."""
