"""The checkpoint itself, run by PyTorch: what every engine is compared with."""
