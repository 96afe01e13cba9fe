"""TensorRT and TensorRT-RTX: builders in a process of their own, runtimes, profiles."""
