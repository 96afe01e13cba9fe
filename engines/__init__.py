"""Engines: build them from ONNX, prove what they run, compare and time them. Every runtime is a module of its own."""
