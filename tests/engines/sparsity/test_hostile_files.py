"""Files that somebody broke, on purpose or not: the doctor answers or refuses, and never calls a broken one ready."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import pytest
from onnx import helper

from nxm_export.errors import NxmError
from nxm_export.pipeline.file_diagnosis import diagnose_file
from tests.support.qdq_graphs import QdqProduct

OPERATORS = (
    *("QuantizeLinear", "DequantizeLinear", "MatMul", "Gemm", "Conv", "Identity", "Transpose", "Reshape", "Cast"),
    *("Split", "Concat", "Einsum", "Shape", "Gather", "MatMulInteger", "QLinearMatMul", "GRU", "LSTM", "Slice", "Loop"),
    *("ConvTranspose", "If", "Mul", "QLinearConv", "Attention", "FusedMatMul", "Squeeze", "Expand", "Pad", "Constant"),
)
ATTRIBUTES = (
    *("axis", "perm", "block_size", "output_dtype", "transB", "group", "axes", "to", "kernel_shape", "start"),
    *("equation", "hidden_size", "num_outputs", "value"),
)
VALUES = (0, 1, -1, 99, -99, [1, 0], [5, 5], [-1], "a", "ij,jk->ik", 1.5)
MODELS = (
    QdqProduct(),
    QdqProduct(bias="int32", moves=("Reshape", "Transpose")),
    QdqProduct(weight_pair=True, weight_moves=("Transpose", "Identity")),
    QdqProduct(weight_type="INT4", weight_block=32),
    QdqProduct(weight_type="FLOAT", input_type="float", output_type=None),
)


def broken(choose: random.Random) -> onnx.ModelProto:
    """A model with one to four things changed that nobody should have changed."""
    model = choose.choice(MODELS).model()
    graph = model.graph
    for _ in range(choose.randint(1, 4)):
        node, tensor = choose.choice(graph.node), choose.choice(graph.initializer)
        names = [name for other in graph.node for name in (*other.input, *other.output)]
        kind = choose.randrange(12)
        if kind == 0 and node.input:
            node.input[choose.randrange(len(node.input))] = choose.choice([*names, "", "nothing"])
        elif kind == 1 and node.input:
            del node.input[choose.randrange(len(node.input)) :]
        elif kind == 2:
            node.input.append(choose.choice(names))
        elif kind == 3:
            node.op_type = choose.choice(OPERATORS)
        elif kind == 4:
            tensor.data_type = choose.randrange(26)
        elif kind == 5 and tensor.dims:
            tensor.dims[choose.randrange(len(tensor.dims))] = choose.choice([0, 1, 2, -1, 10**6, 2**40])
        elif kind == 6:
            tensor.dims.append(choose.choice([0, 1, 2]))
        elif kind == 7:
            node.attribute.append(helper.make_attribute(choose.choice(ATTRIBUTES), choose.choice(VALUES)))
        elif kind == 8:
            node.domain = choose.choice(["", "com.microsoft", "example", "ai.onnx"])
        elif kind == 9:
            model.opset_import[0].version = choose.choice([0, 1, 7, 10, 13, 17, 99])
        elif kind == 10 and node.output:
            node.output[choose.randrange(len(node.output))] = choose.choice(names)
        elif kind == 11:
            graph.node.append(node)
    return model


def answers(count: int, directory: Path) -> int:
    """How many of `count` broken files were judged, not refused."""
    choose, judged = random.Random(0), 0
    for _ in range(count):
        (directory / "broken.onnx").write_bytes(broken(choose).SerializeToString())
        target = choose.choice([("trt", "8.6", "8.0"), ("trt_rtx", None, "8.9"), ("trt", "10.3", "9.0")])
        try:
            found = diagnose_file(directory / "broken.onnx", *target)
        except NxmError:
            continue
        judged += 1
        assert not (found.problems and any(weight.ready for weight in found.sparsity.weights))
    return judged


def test_sixty_broken_files_are_answered_or_refused(tmp_path: Path) -> None:
    assert 5 < answers(60, tmp_path) < 55, "both happens"


@pytest.mark.slow  # the same, more often
def test_two_thousand_broken_files_are_answered_or_refused(tmp_path: Path) -> None:
    answers(2000, tmp_path)
