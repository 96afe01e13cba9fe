"""Weights in files beside an ONNX file, of any name and size, are taken into the engine's one file, bit for bit."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.base import backend, copy_companions
from nxm_export.contract.plan import NMPattern
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable, NxmError
from nxm_export.graph import external_data
from nxm_export.graph.external_data import has_external_data
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.graph.verifier import verify
from nxm_export.pipeline.engine_builds import build_engine, build_fastest
from nxm_export.pipeline.file_diagnosis import diagnose_file
from nxm_export.storage.hashing import file_hash
from tests.support import onnx_text
from tests.support.qdq_graphs import QdqProduct

BACKENDS = ("ort", "openvino")


def save(directory: Path, data: str | None = "weights.bin") -> Path:
    """x (batch, 64) times an initializer, a Constant's tensor and one inside an If, all in the file `data`."""
    random = np.random.default_rng(0)
    w, c, inner = (numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float32), n) for n in "wci")
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["h2", "i"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        [inner],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Constant", [], ["c"], value=c),
        helper.make_node("MatMul", ["h", "c"], ["h2"]),
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 64])],
        [w],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    directory.mkdir()
    if data is not None:
        onnx.external_data_helper.convert_model_to_external_data(
            model, location=data, size_threshold=100, convert_attribute=True
        )
    onnx.save(model, directory / "net.onnx")
    return directory / "net.onnx"


@pytest.mark.parametrize("data", ["net.onnx.data", "weights.bin"])
@pytest.mark.parametrize("name", BACKENDS)
def test_an_engine_holds_the_weights_itself(data: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip(name if name == "openvino" else "onnxruntime")
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    plain, beside = save(tmp_path / "plain", None), save(tmp_path / "beside", data)
    assert (has_external_data(load_graph(plain)), has_external_data(load_graph(beside))) == (False, True)
    build_engine(beside, tmp_path / "engine", name)
    shutil.rmtree(tmp_path / "beside")
    with backend(name).load(tmp_path / "engine") as engine:
        # Two runtimes and the sums of 64 products of float32.
        np.testing.assert_allclose(engine.run({"x": x})["y"], onnx_text.run(plain, {"x": x})["y"], rtol=1e-4, atol=1e-3)
    assert not has_external_data(load_graph(tmp_path / "engine" / "model.onnx"))


def test_the_fastest_of_all_is_found_for_them_too(tmp_path: Path) -> None:
    assert build_fastest(save(tmp_path / "beside"), tmp_path / "engine", shapes=[(1, 64)]).passport.backend in BACKENDS


@pytest.mark.parametrize("dense", [False, True])
def test_a_weight_beside_its_file_is_judged_like_one_within(dense: bool, tmp_path: Path) -> None:
    within, beside = QdqProduct(dense=dense).save(tmp_path / "within.onnx"), tmp_path / "beside.onnx"
    ir.save(load_graph(within), beside, external_data="w.data")
    assert has_external_data(load_graph(beside))
    assert verify(beside, pattern=NMPattern(2, 4)).passed is not dense
    judged = [diagnose_file(file, "trt", "8.6", "8.0").to_dict() for file in (within, beside)]
    assert judged[0]["weights"] == judged[1]["weights"]
    assert [weight.ready for weight in diagnose_file(beside, "trt", "8.6", "8.0").sparsity.weights] == [not dense]


@pytest.mark.parametrize("name", [*BACKENDS, "trt_rtx"])
def test_the_hash_of_the_graph_is_another_when_weights_beside_it_are(name: str, tmp_path: Path) -> None:
    made: list[tuple[str, str]] = []
    for seed in (0, 0, 1):
        file, out = save(tmp_path / f"graph{len(made)}"), tmp_path / f"engine{len(made)}"
        data = bytearray(file.with_name("weights.bin").read_bytes())
        data[0] ^= seed
        file.with_name("weights.bin").write_bytes(data)
        try:
            passport = build_engine(file, out, name)
        except EngineUnavailable as error:
            pytest.skip(str(error))
        assert verify(file).hashes == {part: file_hash(file.with_name(part)) for part in ("net.onnx", "weights.bin")}
        made.append((file_hash(file), passport.onnx_sha256))
    (one, first), (two, again), (three, other) = made
    assert one == two == three
    assert first == again != other


def test_weights_that_change_while_they_are_built_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path / "beside")

    def changed_meanwhile(source: Path, out: Path) -> None:
        data = file.with_name("weights.bin").read_bytes()
        file.with_name("weights.bin").write_bytes(data[::-1])
        copy_companions(source, out)

    monkeypatch.setattr("engines.ort.backend.copy_companions", changed_meanwhile)
    with pytest.raises(ArtifactError, match=r"weights\.bin changed while it was read"):
        build_engine(file, tmp_path / "engine", "ort")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("name", [*BACKENDS, "auto"])
@pytest.mark.parametrize("damage", ["missing", "short", "elsewhere"])
def test_weights_that_cannot_be_read_are_an_error(name: str, damage: str, tmp_path: Path) -> None:
    file = save(tmp_path / "beside")
    data = file.with_name("weights.bin")
    if damage == "missing":
        data.unlink()
    elif damage == "short":
        data.write_bytes(data.read_bytes()[:5000])
    else:
        data.rename(tmp_path / "weights.bin")
        model = onnx.load(file, load_external_data=False)
        model.graph.initializer[0].external_data[0].value = "../weights.bin"
        file.write_bytes(model.SerializeToString())
    build = build_fastest if name == "auto" else partial(build_engine, name=name)
    with pytest.raises(ArtifactError, match=r"net\.onnx: .*(cannot be read|not a readable)"):
        build(file, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("name", BACKENDS)
def test_what_does_not_fit_into_one_file_is_refused_by_its_size(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(external_data, "PROTOBUF_LIMIT", 3 * 64 * 64 * 4)
    with pytest.raises(EngineError, match=r"its weights have 0\.0 GB, and an engine for the CPU is one ONNX file"):
        build_engine(save(tmp_path / "beside"), tmp_path / "engine", name)


def test_a_file_that_only_lies_beside_is_nobody_s_business(tmp_path: Path) -> None:
    file = save(tmp_path / "plain", None)
    file.with_name("net.onnx.data").write_bytes(b"0")
    for name in BACKENDS:
        try:
            build_engine(file, tmp_path / name, name)
        except NxmError as error:
            pytest.fail(str(error))


def test_a_sparse_initializer_is_stored_dense(tmp_path: Path) -> None:
    """Which OpenVINO does not read."""
    values, at = np.array([2.0, 3.0], np.float32), np.array([0, 5], np.int64)  # of 2 x 3
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(values, "w"), numpy_helper.from_array(at, "at"), [2, 3])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])],
        sparse_initializer=[sparse],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    for name in BACKENDS:
        build_engine(tmp_path / "net.onnx", tmp_path / name, name)
        with backend(name).load(tmp_path / name) as engine:
            np.testing.assert_array_equal(engine.run({"x": np.ones((1, 2), np.float32)})["y"], [[2.0, 0.0, 3.0]])
