"""What the products of an ONNX graph multiply with: their weights as the operators compute them."""
