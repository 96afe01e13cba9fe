"""Compression: N:M sparsity by second-order pruning or ADMM, low-bit quantization by straight-through training, and the
search that mixes them."""
