"""Which weights become zero: ADMM, second-order pruning, channel permutation."""
