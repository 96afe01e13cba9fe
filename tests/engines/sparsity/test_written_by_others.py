"""Files that torch's exporter and ONNX Runtime's optimizers and quantizers really write, here and now: every product of
them is read, and what TensorRT would not take of them is said. The model is the same each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.base import backend
from nxm_export.errors import EngineError
from nxm_export.graph.verifier import verify
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.file_diagnosis import FileDiagnosis, diagnose_file
from nxm_export.pipeline.inspection import GraphFacts, inspect_path
from tests.support import onnx_text

runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'nxm-export[ort]'")
WORDS, HIDDEN, WIDE, CLASSES = 50, 64, 128, 4
IDS = np.random.default_rng(5).integers(0, WORDS, (4, 8))


def weights() -> dict[str, np.ndarray]:
    """By name, as (K, N): two matrices that are 2:4 along K, a dense one, and what stands around them."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) * 0.1).astype(np.float32)

    made = {
        "words": normal(WORDS, HIDDEN), "up": normal(HIDDEN, WIDE), "up_bias": normal(WIDE),
        "down": normal(WIDE, HIDDEN), "norm": 1 + normal(HIDDEN), "norm_bias": normal(HIDDEN),
        "head": normal(HIDDEN, CLASSES), "head_bias": normal(CLASSES),
    }  # fmt: skip
    for name in ("up", "down"):
        made[name][np.arange(len(made[name])) % 4 < 2] = 0
    return made


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding, a feed-forward network with its residual and norm, and a head, as a plain file."""
    held = weights() | {"zero": np.array(0)}
    node = helper.make_node
    nodes = [
        node("Gather", ["words", "input_ids"], ["h"]),
        node("MatMul", ["h", "up"], ["a"], "up_product"),
        node("Add", ["a", "up_bias"], ["b"]),
        node("Gelu", ["b"], ["c"]),
        node("MatMul", ["c", "down"], ["d"], "down_product"),
        node("Add", ["h", "d"], ["e"]),
        node("LayerNormalization", ["e", "norm", "norm_bias"], ["f"], axis=-1),
        node("Gather", ["f", "zero"], ["g"], axis=1),
        node("Gemm", ["g", "head", "head_bias"], ["logits"], "head_product"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    file = tmp_path_factory.mktemp("float") / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), file)
    return file


def asked(file: Path, version: str = "10.14") -> FileDiagnosis:
    return diagnose_file(file, "trt", version, "8.0")


def require_read(file: Path) -> None:
    """Every product is read by doctor, verify and inspect, with the pattern that was put in."""
    shapes = {(HIDDEN, WIDE): True, (WIDE, HIDDEN): True, (HIDDEN, CLASSES): False}
    found = asked(file)
    assert not found.sparsity.unread
    assert {(weight.k, weight.n): weight.sparse_along_k for weight in found.sparsity.weights} == shapes
    assert str(found.sparsity.products) == str(verify(file).products) == "3 products, 3 read, 2 sparse"
    facts = inspect_path(file)
    assert isinstance(facts, GraphFacts)
    assert list(facts.inputs) == ["input_ids"]


def require_built(file: Path, out: Path, name: str, tolerance: float) -> None:
    """An engine of it gives what ONNX Runtime makes of the file."""
    expected = onnx_text.run(file, {"input_ids": IDS})["logits"]
    build_engine(file, out, name)
    with backend(name).load(out) as engine:
        np.testing.assert_allclose(engine.run({"input_ids": IDS})["logits"], expected, atol=tolerance)


def optimized(source: Path, out: Path, level: str) -> None:
    options = runtime.SessionOptions()
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 3
    runtime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def fused_for_transformers(source: Path, out: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    optimizer.optimize_model(str(source), model_type="bert", num_heads=4, hidden_size=HIDDEN).save_model_to_file(
        str(out)
    )


OPTIMIZERS: dict[str, Callable[[Path, Path], None]] = {
    "basic": partial(optimized, level="ORT_ENABLE_BASIC"),
    "extended": partial(optimized, level="ORT_ENABLE_EXTENDED"),
    "all": partial(optimized, level="ORT_ENABLE_ALL"),
    "transformers": fused_for_transformers,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_float_model_that_onnx_runtime_optimized(name: str, float_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "optimized.onnx"
    OPTIMIZERS[name](float_file, file)
    require_read(file)
    contrib = sorted({node.op_type for node in onnx.load(file).graph.node if node.domain == "com.microsoft"})
    assert contrib == ([] if name == "basic" else ["BiasGelu", "SkipLayerNormalization"])
    for version in ("8.6", "10.14"):
        found = asked(file, version)
        for operator in contrib:
            assert any(f"has no operator {operator} of com.microsoft" in problem for problem in found.problems)
            assert all(weight.eligible is not True for weight in found.sparsity.weights)
        assert not any(weight.ready for weight in found.sparsity.weights)
    require_built(file, tmp_path / "ort", "ort", 1e-4)


class Samples:
    """What ONNX Runtime's quantizers calibrate on."""

    def __init__(self) -> None:
        self.batches = iter([{"input_ids": IDS}] * 2)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def static(source: Path, out: Path, kind: str, **options: object) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    types = {key: getattr(quantization.QuantType, str(value)) for key, value in options.items() if key.endswith("type")}
    given = {key: value for key, value in options.items() if key not in types}
    form = getattr(quantization.QuantFormat, kind)
    quantization.quantize_static(source, out, Samples(), quant_format=form, **given, **types)


def dynamic(source: Path, out: Path, **options: object) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    quantization.quantize_dynamic(source, out, **options)


SYMMETRIC: dict[str, Any] = {
    "activation_type": "QInt8",
    "weight_type": "QInt8",
    "extra_options": {"ActivationSymmetric": True},
}
# What quantizes, and words that must stand among the doctor's problems for any version of TensorRT.
QUANTIZERS: dict[str, tuple[Callable[[Path, Path], None], tuple[str, ...]]] = {
    "QDQ, as it is": (
        partial(static, kind="QDQ"),
        ("is not 0, and TensorRT refuses asymmetric activations", "dequantizes INT32"),
    ),
    "QDQ, symmetric, per channel": (partial(static, kind="QDQ", per_channel=True, **SYMMETRIC), ("dequantizes INT32",)),
    "QDQ, unsigned": (
        partial(static, kind="QDQ", activation_type="QUInt8", weight_type="QInt8"),
        ("computes INT8 instead", "dequantizes INT32"),
    ),
    "operators": (
        partial(static, kind="QOperator", per_channel=True),
        ("has no operator QLinearMatMul", "QGemm nodes: only ONNX Runtime takes it"),
    ),
    "dynamic": (
        dynamic,
        ("has no operator MatMulInteger", "dynamic quantization, which TensorRT does not take"),
    ),
    "dynamic, per channel": (partial(dynamic, per_channel=True), ("has no operator MatMulInteger",)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_file_of_onnx_runtimes_quantizers(name: str, float_file: Path, tmp_path: Path) -> None:
    quantize, words = QUANTIZERS[name]
    file = tmp_path / "quantized.onnx"
    quantize(float_file, file)
    require_read(file)
    for version in ("8.6", "10.14"):
        found = asked(file, version)
        for word in words:
            assert any(word in problem for problem in found.problems), found.problems
        for weight in found.sparsity.weights:
            assert (weight.type, weight.ready, weight.eligible) == ("int8", False, False)
            assert weight.reason == ("refused" if weight.sparse_along_k else "not-planned")
        assert not any(entry.ready for entry in found.advice)
    require_built(file, tmp_path / "ort", "ort", 0.02)  # steps of INT8, which fusions may round otherwise
    if name == "operators":
        with pytest.raises(EngineError, match="QLinearMatMul"):
            require_built(file, tmp_path / "openvino", "openvino", 0.1)
    else:
        require_built(file, tmp_path / "openvino", "openvino", 0.1)


@pytest.mark.slow  # the exporter takes its time to load
def test_a_float_model_of_torchs_dynamo_exporter_with_weights_beside_it_and_within(tmp_path: Path) -> None:
    pytest.importorskip(
        "onnxscript", reason="torch's dynamo exporter needs onnxscript: pip install 'nxm-export[export]'"
    )
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(WORDS, HIDDEN), nn.LayerNorm(HIDDEN)
            self.up, self.down = nn.Linear(HIDDEN, WIDE), nn.Linear(WIDE, HIDDEN, bias=False)
            self.head = nn.Linear(HIDDEN, CLASSES)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            h = self.words(input_ids)
            logits: torch.Tensor = self.head(self.norm(h + self.down(nn.functional.gelu(self.up(h))))[:, 0])
            return logits

    net, held = Net().eval(), {name: torch.from_numpy(array) for name, array in weights().items()}
    state = {
        "words.weight": held["words"], "norm.weight": held["norm"], "norm.bias": held["norm_bias"],
        "up.weight": held["up"].T, "up.bias": held["up_bias"], "down.weight": held["down"].T,
        "head.weight": held["head"].T, "head.bias": held["head_bias"],
    }  # fmt: skip
    net.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    ids = torch.from_numpy(IDS)
    program = torch.onnx.export(
        net, (ids,), dynamo=True, input_names=["input_ids"], output_names=["logits"], verbose=False,
        dynamic_shapes={"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}},
    )  # fmt: skip
    assert program is not None
    with torch.no_grad():
        expected = net(ids).numpy()
    judged = []
    for beside in (True, False):
        file = tmp_path / str(beside) / "net.onnx"
        file.parent.mkdir()
        program.save(str(file), external_data=beside)
        assert file.with_name("net.onnx.data").is_file() is beside
        require_read(file)
        found = asked(file)
        assert not found.problems
        assert {weight.reason for weight in found.sparsity.weights if weight.sparse_along_k} == {"kernel-unknown"}
        judged.append([weight.detail for weight in found.sparsity.weights])
        for name in ("ort", "openvino"):
            require_built(file, tmp_path / f"{name}-{beside}", name, 1e-4)
        np.testing.assert_allclose(onnx_text.run(file, {"input_ids": IDS})["logits"], expected, atol=1e-4)
    assert judged[0] == judged[1]
