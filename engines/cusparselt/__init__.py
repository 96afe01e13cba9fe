"""Sparse INT8 on an NVIDIA GPU with torch and cuSPARSELt alone: no TensorRT. docs/cusparselt.md says what ran where."""
