"""Damaged files: what is asked of them ends with an answer or an error of ours, never with a traceback."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from nxm_export.contract.plan import NMPattern
from nxm_export.errors import NxmError
from nxm_export.graph.verifier import verify
from nxm_export.pipeline.file_diagnosis import diagnose_file
from nxm_export.pipeline.inspection import inspect_path

OPERATORS = (
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "QLinearMatMul", "MatMulInteger", "Attention", "Split",
    "Concat", "Reshape", "Gather", "Slice", "Expand", "Range", "Cast", "Constant", "Where", "If", "Loop", "Scan",
    "QuantizeLinear", "DequantizeLinear", "Unheard",
)  # fmt: skip
ATTRIBUTES = ("axis", "group", "transB", "equation", "perm", "block_size", "to", "output_dtype", "num_scan_inputs")


def whole() -> onnx.ModelProto:
    """A file with most of what the reader looks at: quantizers, a Split, a branch, a convolution, a cell."""
    rng = np.random.default_rng(0)
    held: dict[str, np.ndarray] = {
        "w": rng.integers(-9, 9, (16, 32)).astype(np.int8),
        "s": np.ones(32, np.float32),
        "z": np.zeros(32, np.int8),
        "t": np.array(0.1, np.float32),
        "u": np.array(0, np.int8),
        "f": rng.normal(size=(16, 16)).astype(np.float32),
        "k": rng.normal(size=(4, 1, 3)).astype(np.float32),
        "r": rng.normal(size=(1, 24, 16)).astype(np.float32),
        "h": rng.normal(size=(1, 24, 8)).astype(np.float32),
        "parts": np.array([16, 16]),
        "image": np.array([-1, 1, 16]),
    }
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "f"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, 1, None)],
        )
        for name in ("yes", "no")
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "t", "u"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "t", "u"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], axis=1),
        helper.make_node("Split", ["wd", "parts"], ["left", "right"], axis=1),
        helper.make_node("Transpose", ["right"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["xd", "left"], ["a"]),
        helper.make_node("Gemm", ["xd", "turned"], ["b"], transB=1),
        helper.make_node("If", ["c"], ["d"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Einsum", ["x", "f"], ["e"], equation="bk,kn->bn"),
        helper.make_node("Reshape", ["x", "image"], ["i"]),
        helper.make_node("Conv", ["i", "k"], ["v"], kernel_shape=[3], group=1),
        helper.make_node("GRU", ["i", "r", "h"], ["g", ""], hidden_size=8),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 16]), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info(name, 1, None) for name in "abdevg"],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def damage(model: onnx.ModelProto, rng: random.Random) -> None:
    """One thing wrong with a node, a constant or the head of a file."""
    graph = model.graph
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    match rng.randrange(12):
        case 0:
            del node.input[rng.randrange(len(node.input)) :]
        case 1:
            node.input[rng.randrange(len(node.input))] = ""
        case 2:
            node.input[rng.randrange(len(node.input))] = rng.choice(list(rng.choice(graph.node).output))
        case 3:
            del node.attribute[:]
        case 4 if node.attribute:
            rng.choice(node.attribute).type = rng.choice([1, 2, 3, 6, 7, 8])
        case 5 if node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i, attribute.type = rng.choice([-1, 0, 5, 99, -(2**62), 2**62]), 2
        case 6:
            node.attribute.append(helper.make_attribute(rng.choice(ATTRIBUTES), rng.choice([1, -7, "x", [1, 2], 1.5])))
        case 7:
            node.op_type = rng.choice(OPERATORS)
        case 8:
            node.domain = rng.choice(["", "com.microsoft", "somebody", "ai.onnx", "ai.onnx.ml"])
        case 9:
            del tensor.dims[:]
            tensor.dims.extend(rng.choice([[], [0], [-1], [2**40], [16, 8], [1]]))
        case 10:
            tensor.data_type = rng.randrange(30)
        case _:
            tensor.raw_data = tensor.raw_data[: rng.randrange(1 + len(tensor.raw_data))]


def ask_everything(file: Path) -> int:
    """How many of the three commands answer; any error that is not ours is the test's failure."""
    commands: list[Callable[[], object]] = [
        lambda: verify(file, pattern=NMPattern(2, 4)),
        lambda: diagnose_file(file, "trt"),
        lambda: inspect_path(file),
    ]
    answers = 0
    for command in commands:
        try:
            command()
            answers += 1
        except NxmError:
            continue
    return answers


@pytest.mark.parametrize("files", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_file_gets_an_answer_or_an_error_of_ours(files: int, tmp_path: Path) -> None:
    good, file = whole(), tmp_path / "damaged.onnx"
    onnx.save(good, file)
    assert ask_everything(file) == 3
    answers = 0
    for seed in range(files):
        rng = random.Random(seed)
        model = onnx.ModelProto()
        model.CopyFrom(good)
        for _ in range(rng.choice([1, 1, 2, 3])):
            damage(model, rng)
        file.write_bytes(model.SerializeToString())
        answers += ask_everything(file)
    assert files < answers < 3 * files  # some are refused, and most damage leaves something to say
