"""Low-bit weights and INT8 activations in training: fake quantizers, their gradients, their observers."""
