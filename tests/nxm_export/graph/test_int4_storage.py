"""Weights of 4 bits or fewer, stored as INT4: the codes of the checkpoint, the numbers of INT8 storage, and no word of
INT4 where nothing would be stored so."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import WeightSpec
from nxm_export.errors import ExportError
from nxm_export.graph.exporter import Exported, export
from nxm_export.graph.implied_zero_points import imply_zero_points
from nxm_export.graph.int4_storage import CAST, DIRECT, store_int4
from nxm_export.graph.qdq import Linear, fold_weight_qdq
from nxm_export.graph.reading.graph_weights import GraphWeight, graph_weights, load_graph, parameter_of, save_graph
from nxm_export.graph.verifier import verify, verify_model
from tests.support import baked, onnx_text, tiny
from tests.support.variants import placements_of, variants

BITS = {"*query*": "W2", "*key*": "2:4+W3", "*value*": "2:4+W4", "*intermediate*": "1:4+W5", "*.output.dense*": "W4"}
CASES = list(itertools.product(("inputs", "inputs-outputs", "products", "attention"), ("matmul", "gemm", "conv1x1")))
FAST = (("attention", "matmul"), ("inputs-outputs", "gemm"))
FEEDS = baked.feeds("bert", 3, 17, padding=4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights of 2 to 5 bits, with and without a pattern, and INT8 attention."""
    return baked.write_checkpoint("bert", tmp_path_factory.mktemp("mixed") / "c", specs=BITS, attention="int8")


def by_name(file: Path) -> dict[str, GraphWeight]:
    return {parameter_of(weight.name): weight for weight in graph_weights(load_graph(file))}


class TestExported:
    @pytest.fixture(scope="class")
    def graphs(self, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
        out = tmp_path_factory.mktemp("graphs")
        return {stored: export(mixed, out / stored, weights_stored=stored) for stored in ("int8", "int4")}

    def test_weights_of_4_bits_or_fewer_are_int4_and_no_others(self, mixed: Path, graphs: dict[str, Exported]) -> None:
        checkpoint, read = open_checkpoint(mixed), by_name(graphs["int4"].path)
        for name, spec in checkpoint.plan.weights.items():
            expected = "INT4" if spec.weight_bits and spec.weight_bits <= 4 else "INT8"
            assert (read[name].stored, read[name].codes) == (expected, "INT8"), name
            np.testing.assert_array_equal(read[name].matrix, checkpoint.codes(name).T)
            np.testing.assert_array_equal(read[name].scale, checkpoint.weight_scale(name))

    def test_a_code_takes_half_a_byte(self, mixed: Path, graphs: dict[str, Exported]) -> None:
        constants = load_graph(graphs["int4"].path).graph.initializers
        for name, spec in open_checkpoint(mixed).plan.weights.items():
            stored = constants[f"{name}_quantized"].const_value
            assert stored is not None
            assert stored.nbytes == stored.size // (2 if (spec.weight_bits or 8) <= 4 else 1)
        assert graphs["int4"].bytes < graphs["int8"].bytes

    def test_the_graph_says_how_its_weights_are_stored_and_int8_is_what_it_was(
        self, graphs: dict[str, Exported]
    ) -> None:
        int8, int4 = (load_graph(graphs[stored].path) for stored in ("int8", "int4"))
        assert (int8.opset_imports[""], int4.opset_imports[""]) == (20, 21)
        assert int4.metadata_props["nxm.weights_stored"] == "int4"
        assert "nxm.weights_stored" not in int8.metadata_props
        assert not [node for node in int8.graph if node.op_type == "Cast" and (node.name or "").endswith("_cast")]

    def test_verify_sees_a_code_beyond_the_planned_bits_and_a_broken_pattern(
        self, mixed: Path, graphs: dict[str, Exported], tmp_path: Path
    ) -> None:
        import ml_dtypes

        assert verify(graphs["int4"].path).all_problems == []
        model = load_graph(graphs["int4"].path)
        names = [name for name in by_name(graphs["int4"].path) if name.endswith(("query.weight", "key.weight"))]
        for name in names:
            stored = model.graph.initializers[f"{name}_quantized"]
            assert stored.const_value is not None
            stored.const_value = ir.tensor(np.full(stored.const_value.shape.numpy(), 3, ml_dtypes.int4))
        save_graph(model, tmp_path / "model.onnx")
        query, key = sorted(verify(tmp_path / "model.onnx").all_problems, reverse=True)
        assert query == f"{names[0]}: a code exceeds 1, the planned 2 bits"
        assert key.startswith(f"{names[1]}: not 2:4 along K")


class TestOnnxRuntimeLoadsThePlainFile:
    @pytest.mark.parametrize(("placement", "lowering"), variants(CASES, FAST))
    def test_with_all_optimizers_and_the_numbers_of_int8_storage(
        self, mixed: Path, tmp_path: Path, placement: str, lowering: str
    ) -> None:
        logits = [
            onnx_text.run(
                export(mixed, tmp_path / kind, placement=placement, lowering=lowering, weights_stored=kind).path,
                FEEDS,
                optimize=True,
            )["logits"]
            for kind in ("int8", "int4")
        ]
        np.testing.assert_array_equal(logits[1], logits[0])

    @pytest.mark.parametrize("family", variants([name for name in FAMILIES if name != "bert"], (), slow=tiny.DISTINCT))
    def test_of_every_family(self, tmp_path: Path, family: str) -> None:
        quantized = "attention" in placements_of(FAMILIES[family])
        attention, placement = ("int8", "attention") if quantized else ("float", "inputs-outputs")
        checkpoint = baked.write_checkpoint(family, tmp_path / "c", spec="2:4+W4", attention=attention, layers=2)
        feeds, logits = baked.feeds(family, 3, 17, padding=4), []
        for stored in ("int8", "int4"):
            graph = export(checkpoint, tmp_path / stored, placement=placement, weights_stored=stored).path
            logits.append(onnx_text.run(graph, feeds, optimize=True)["logits"])
        np.testing.assert_array_equal(logits[1], logits[0])

    MOVED = """
    g (float[batch, 4] x) => (float[batch, 2, 2] y) <float s = {0.5}, int8 z = {0}, int64[3] shape = {-1, 2, 2}>
    {
      q = QuantizeLinear(x, s, z)
      d = DequantizeLinear(q, s, z)
      r = Reshape(d, shape)
      y = Transpose<perm = [0, 2, 1]>(r)
    }
    """

    def test_a_pair_in_front_of_a_reshape_states_no_zero_point_behind_it(self) -> None:
        model = onnx_text.model(self.MOVED)
        x = np.array([[-70.0, -0.26, 0.75, 70.0]], np.float32)
        before = onnx_text.run(model, {"x": x})["y"]
        with pytest.raises(Exception, match="output_dtype INT8 does not match y_zero_point type UINT8"):
            onnx_text.run(model, {"x": x}, optimize=True)  # where this loads, the module can go
        assert imply_zero_points(model.graph) == 1
        np.testing.assert_array_equal(onnx_text.run(model, {"x": x}, optimize=True)["y"], before)
        assert before.reshape(-1).tolist() == [-64.0, 1.0, -0.5, 63.5]

    def test_weights_and_pairs_that_nothing_moves_keep_theirs(self) -> None:
        model = onnx_text.model("""
        g (float[batch, 4] x) => (float[batch, 4] y) <float s = {0.5}, int8 z = {0}, int8[2, 2] w = {1, 2, 3, 4},
         float[2] ws = {1, 1}, int8[2] wz = {0, 0}, int64[1] shape = {-1}>
        {
          q = QuantizeLinear(x, s, z)
          d = DequantizeLinear(q, s, z)
          m = DequantizeLinear<axis = 1>(w, ws, wz)
          r = Reshape(m, shape)
          y = Add(d, r)
        }
        """)
        assert imply_zero_points(model.graph) == 0


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"target": "trt8"}, "target trt8: TensorRT 8.6 has no INT4"),
            ({"placement": "float"}, "no weight of this graph is an integer of 4 bits or fewer"),
            ({"target": "trt", "lowering": "conv1x1"}, "target trt keeps INT8 for weights with an N:M pattern"),
            ({"weights_stored": "int2"}, "unknown weights stored 'int2'; choose one of int8, int4"),
        ],
    )
    def test_an_option_that_would_do_nothing_says_why(
        self, mixed: Path, tmp_path: Path, options: dict[str, str], reason: str
    ) -> None:
        with pytest.raises(ExportError, match=reason):
            export(mixed, tmp_path / "out", **({"weights_stored": "int4"} | options))  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("spec", "target"), [("2:4+W8", "cpu"), ("2:4", "cpu"), ("2:4+W4", "trt")])
    def test_a_plan_without_such_weights_is_named(self, tmp_path: Path, spec: str, target: str) -> None:
        checkpoint = baked.write_checkpoint("bert", tmp_path / "c", spec=spec)
        with pytest.raises(ExportError, match="of 4 bits"):
            export(checkpoint, tmp_path / "out", target=target, weights_stored="int4")

    def test_so_is_a_dense_model(self, mixed: Path, tmp_path: Path) -> None:
        model = tiny.write_model("bert", tmp_path / "m", head="classification")
        with pytest.raises(ExportError, match=r"no weight of this graph is an integer of 4 bits .* --weight-bits 4"):
            export(model, tmp_path / "out", weights_stored="int4")


@pytest.mark.parametrize("lowering", ["matmul", "gemm"])
def test_tensorrt_gets_int4_for_dense_weights_alone(mixed: Path, tmp_path: Path, lowering: str) -> None:
    exported = export(mixed, tmp_path / "trt", target="trt", lowering=lowering, weights_stored="int4")
    checkpoint, read = open_checkpoint(mixed), by_name(exported.path)
    for name, spec in checkpoint.plan.weights.items():
        dense_of_4_bits = spec.pattern is None and (spec.weight_bits or 8) <= 4
        kind = "INT4" if dense_of_4_bits else "INT8"
        assert (read[name].stored, read[name].codes) == (kind, kind), name
        np.testing.assert_array_equal(read[name].matrix, checkpoint.codes(name).T)
        assert read[name].zero_point is not None
    assert verify(exported.path).all_problems == []


@given(
    st.sampled_from([CAST, DIRECT]),
    st.integers(2, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["MatMul", "Gemm"]),
    st.integers(0, 2**32 - 1),
)
def test_any_codes_are_read_back_and_computed_as_from_int8(
    form: str, bits: int, k: int, n: int, op: str, seed: int
) -> None:
    """Odd sizes, too, where two codes of a byte belong to different rows, and one is left at the end."""
    rng = np.random.default_rng(seed)
    qmax = 2 ** (bits - 1) - 1
    codes = rng.integers(-qmax, qmax + 1, (n, k)).astype(np.int8)
    scale, x = rng.uniform(0.01, 1, n).astype(np.float32), rng.standard_normal((2, k)).astype(np.float32)
    outputs = []
    for stored in ("int8", "int4"):
        model = _one_product(op, codes, scale)
        if stored == "int4":
            store_int4(model.graph, ["w"], form)
            model = ir.from_proto(ir.to_proto(model))  # as a file has it
        (weight,) = graph_weights(model)
        assert weight.stored == stored.upper()
        np.testing.assert_array_equal(weight.matrix, codes.T)
        assert verify_model(model, "g").all_problems == []
        outputs.append(onnx_text.run(model, {"x": x})["y"])
    np.testing.assert_array_equal(outputs[1], outputs[0])


def _one_product(op: str, codes: np.ndarray, scale: np.ndarray) -> ir.Model:
    n, k = codes.shape
    model = onnx_text.model(
        f"g (float[2, {k}] x) => (float[2, {n}] y) {{ y = {op}{'<transB = 1>' if op == 'Gemm' else ''}(x, w) }}"
    )
    product = next(iter(model.graph))
    (x, _), (y,) = product.inputs, product.outputs
    assert x is not None
    fold_weight_qdq(model.graph, Linear(product, x, y), "w", codes, scale)
    return model


def test_specs_of_the_mixed_plan_are_what_this_file_takes_them_for(mixed: Path) -> None:
    weights = open_checkpoint(mixed).plan.weights
    assert {spec.weight_bits for spec in weights.values()} == {2, 3, 4, 5}
    assert {spec.pattern for spec in weights.values()} == {None, *(WeightSpec.parse(t).pattern for t in ("1:4", "2:4"))}
