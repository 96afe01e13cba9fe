"""Ablations, and the other projects that benchmarks compare with; those run in environments of their own."""
