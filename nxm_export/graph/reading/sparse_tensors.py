"""Sparse tensors of an ONNX file as dense ones: the graph library that everything here uses knows dense ones alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_LARGEST = 2**28  # elements: a few bytes of shape can ask for terabytes


def densify(model: onnx.ModelProto) -> list[str]:
    """Replace sparse initializers and sparse Constant nodes of a model by dense ones; returns their names.

    Raises `ValueError` for one that is malformed or beyond 2^28 elements.
    """
    names = []
    for graph in _graphs(model):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse))
            names.append(sparse.values.name)
        del graph.sparse_initializer[:]
    for node in _nodes(model):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("sparse_tensor"):
                attribute.t.CopyFrom(_dense(attribute.sparse_tensor))
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", type(attribute).TENSOR
                names.append(node.output[0])
    return names


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    from onnx import numpy_helper

    shape, name = tuple(sparse.dims), sparse.values.name
    if any(size < 0 for size in shape) or math.prod(shape) > _LARGEST:
        raise ValueError(f"the sparse tensor {name} has the shape {shape}")
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
    if len(flat) != len(values) or ((flat < 0) | (flat >= math.prod(shape))).any():
        raise ValueError(f"the sparse tensor {name} has indices outside its shape")
    dense = np.zeros(math.prod(shape), values.dtype)
    dense[flat] = values
    return numpy_helper.from_array(dense.reshape(shape), name)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph of a model, and those inside its nodes and functions."""
    pending = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while pending or nodes:
        if pending:
            graph = pending.pop()
            nodes += graph.node
            yield graph
        for node in nodes:
            pending += [
                inner for attribute in node.attribute for inner in [attribute.g, *attribute.graphs] if inner.node
            ]
        nodes = []
