"""Files that other tools make of a 2:4 model, for the doctor: ``python foreign.py {ort,modelopt} OUT.onnx
[dense.onnx]``.

The model is a chain of linear layers pruned 2:4 by magnitude, as ASP leaves it, in plain float ONNX.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper


def pruned_model(file: Path, hidden: int = 256, wide: int = 512) -> None:
    """x -> up (2:4 along K) -> Relu -> down (2:4 along K) -> head (2:4 along N, the wrong axis), batch x hidden."""
    rng = np.random.default_rng(0)

    def pruned(k: int, n: int, axis: int) -> np.ndarray:
        weight = rng.normal(0, 0.05, size=(k, n)).astype(np.float32)
        groups = np.moveaxis(weight, axis, -1).reshape(-1, 4)
        drop = np.argsort(np.abs(groups), axis=-1)[:, :2]
        np.put_along_axis(groups, drop, 0.0, axis=-1)
        moved = groups.reshape(np.moveaxis(weight, axis, -1).shape)
        return np.ascontiguousarray(np.moveaxis(moved, -1, axis))

    weights = {"up": pruned(hidden, wide, 0), "down": pruned(wide, hidden, 0), "head": pruned(hidden, hidden, 1)}
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["a"], name="up_product"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "down"], ["c"], name="down_product"),
        helper.make_node("MatMul", ["c", "head"], ["y"], name="head_product"),
    ]
    graph = helper.make_graph(
        nodes, "asp",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [32, hidden])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [32, hidden])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), file)


def by_ort(source: Path, out: Path) -> None:
    """ONNX Runtime's static quantization, symmetric INT8 per channel, as for TensorRT."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # of a library without types
        def __init__(self) -> None:
            rng = np.random.default_rng(1)
            self.batches = iter([{"x": rng.normal(size=(32, 256)).astype(np.float32)} for _ in range(4)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantize_static(
        source,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )


def by_modelopt(source: Path, out: Path) -> None:
    """NVIDIA ModelOpt's ONNX post-training quantization."""
    from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found]  # in another interpreter

    data = np.random.default_rng(1).normal(size=(128, 256)).astype(np.float32)
    quantize(
        str(source), quantize_mode="int8", calibration_data={"x": data}, output_path=str(out), calibration_eps=["cpu"]
    )


if __name__ == "__main__":
    made = Path(sys.argv[2])
    float_file = made.with_name("pruned.onnx")
    pruned_model(float_file)
    {"ort": by_ort, "modelopt": by_modelopt}[sys.argv[1]](float_file, made)
