"""nxm-export: compress BERT-family encoders to N:M sparsity and low-bit integers, export, build and serve them."""

__version__ = "0.1.0"
