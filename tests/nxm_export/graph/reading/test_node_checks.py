"""Malformed nodes and constants are refused where a file is read, so that nothing behind it meets them."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from nxm_export.errors import ArtifactError
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.graph.verifier import verify
from nxm_export.pipeline.file_diagnosis import diagnose_file
from tests.support.qdq_graphs import K, N, QdqProduct


def saved(directory: Path, *nodes: onnx.NodeProto) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in "xy"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.0, 0.0, 1.0, 1.0] * 4)
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [1.0])
    graph = helper.make_graph(
        [*nodes, helper.make_node("MatMul", ["d", "w"], ["y"], "mm")], "g", ends[:1], ends[1:], [weight, scale]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.save(model, directory / "model.onnx")
    return directory / "model.onnx"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("DequantizeLinear", [], ["d"], "n"), r"n \(DequantizeLinear\) has 0 inputs and needs 2"),
        (helper.make_node("QuantizeLinear", ["x"], ["d"], "n"), r"n \(QuantizeLinear\) has 1 inputs and needs 2"),
        (helper.make_node("Relu", ["x"], [], "n"), r"n \(Relu\) has 0 outputs and needs 1"),
        (
            helper.make_node("Cast", ["x"], ["d"], "n", to=99),
            r"n \(Cast\) has to 99, and there is no such",
        ),
        (helper.make_node("Cast", ["x"], ["d"], "n", to=1.5), r"n \(Cast\) has to of type FLOAT, which is INT"),
        (helper.make_node("Shape", ["x"], ["d"], "n", start="a"), r"has start of type STRING, which is INT"),
        (helper.make_node("Transpose", ["x"], ["d"], "n", perm=[0.5]), r"has perm of type FLOATS, which is INTS"),
        # of a later version of the operator
        (
            helper.make_node("QuantizeLinear", ["x", "s"], ["d"], "n", output_dtype=99),
            r"output_dtype 99",
        ),
    ],
)
def test_what_no_runtime_could_run_is_refused_by_node(node: onnx.NodeProto, message: str, tmp_path: Path) -> None:
    file = saved(tmp_path, node)
    for read in (load_graph, verify, lambda given: diagnose_file(given, "trt", "8.6", "8.0")):
        with pytest.raises(ArtifactError, match=f"model.onnx: .*{message}.*: no runtime can run that"):
            read(file)


def test_a_circle_of_nodes_ends(tmp_path: Path) -> None:
    circle = [helper.make_node("Identity", ["b"], ["a"]), helper.make_node("Identity", ["a"], ["b"])]
    file = saved(tmp_path, *circle, helper.make_node("DequantizeLinear", ["a", "s"], ["d"], "dq"))
    found = diagnose_file(file, "trt", "8.6", "8.0")
    assert "dq: dequantizes what nothing quantized" in found.problems
    assert not any(weight.ready for weight in found.sparsity.weights)


@pytest.mark.parametrize("place", ["numbers", "bytes", "another file"])
def test_a_4_bit_weight_that_was_cut_off_is_not_read_as_zeros(place: str, tmp_path: Path) -> None:
    """onnx_ir pads what is missing with zeros, and a dense weight would have a pattern."""
    model = QdqProduct(weight_type="INT4", dense=True).model()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    data = bytes(weight.int32_data) if weight.int32_data else weight.raw_data
    assert len(data) == K * N // 2
    del weight.int32_data[:]
    if place == "numbers":
        weight.ClearField("raw_data")
        weight.int32_data.extend(data[: len(data) // 4])
    else:
        weight.raw_data = data[: len(data) // 4]
    onnx.save(model, tmp_path / "cut.onnx", save_as_external_data=place == "another file", size_threshold=0)
    with pytest.raises(ArtifactError, match="the data of constant w cannot be read"):
        verify(tmp_path / "cut.onnx")
