"""Evidence from machines that have an NVIDIA GPU, and what can be rehearsed without one; README.md has the order."""
