"""From a checkpoint to an ONNX graph with Q/DQ pairs, and from any ONNX graph to facts about its weights."""
