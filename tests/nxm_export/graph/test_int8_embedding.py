"""The INT8 word-embedding table in a graph: the checkpoint's, in INT8 where the runtime keeps it, and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from nxm_export.cli import main
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import CompressionPlan
from nxm_export.errors import ExportError
from nxm_export.graph.exporter import export
from nxm_export.graph.int8_embedding import embedding_hash, fold_int8_embedding, stored_embedding
from nxm_export.graph.reading.graph_weights import load_graph, save_graph
from nxm_export.graph.targets import TARGETS
from nxm_export.graph.verifier import verify
from tests.support import baked, onnx_text, tiny
from tests.support.variants import variants

TABLE = FAMILIES["bert"].word_embedding
EVERY_FAMILY = variants(FAMILIES, ("bert",), slow=tiny.DISTINCT)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoints(family)``: an untrained checkpoint with an INT8 table whose row 6 is zeros; read it only."""
    made: dict[str, Path] = {}

    def make(family: str = "bert") -> Path:
        if family not in made:
            out = made[family] = tmp_path_factory.mktemp("tables") / family
            baked.write_checkpoint(family, out, embedding="int8")
            tensors, scales = load_file(out / "model.safetensors"), load_file(out / "nxm_scales.safetensors")
            name = FAMILIES[family].word_embedding
            table = tensors[name].copy()
            table[6] = 0.0
            tensors[name], scales[f"{name}_scale"] = baked.baked_table(table)
            save_file(tensors, out / "model.safetensors", {"format": "pt"})
            save_file(scales, out / "nxm_scales.safetensors")
        return made[family]

    return make


@pytest.fixture(scope="module")
def graphs(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``graphs(family, embedding, **options)``: the graph of that checkpoint, with its table stored so; read it
    only."""
    made: dict[str, Path] = {}

    def make(family: str = "bert", embedding: str = "int8", **options: Any) -> Path:
        key = f"{family} {embedding} {options}"
        if key not in made:
            out = tmp_path_factory.mktemp("graphs") / "graph"
            with pytest.MonkeyPatch.context() as patch:
                if embedding == "float":  # as TensorRT's targets have it
                    patch.setitem(TARGETS, "cpu", replace(TARGETS["cpu"], embedding="float"))
                made[key] = export(checkpoints(family), out, **options).path
        return made[key]

    return make


def feeds(family: str = "bert") -> dict[str, np.ndarray]:
    """Ragged input with the row of zeros among its tokens."""
    made = baked.feeds(family, 4, 9, padding=3)
    made["input_ids"][0, 0] = 6
    return made


class TestGraph:
    @pytest.mark.parametrize("family", EVERY_FAMILY)
    def test_it_holds_the_checkpoints_codes_and_scales_and_no_float_table(
        self, family: str, graphs: Callable[..., Path], checkpoints: Callable[..., Path]
    ) -> None:
        checkpoint, model = open_checkpoint(checkpoints(family)), load_graph(graphs(family))
        name = checkpoint.family.word_embedding
        stored = stored_embedding(model.graph, name)
        assert stored is not None
        codes, scale = checkpoint.codes(name), checkpoint.weight_scale(name)
        np.testing.assert_array_equal(stored[0], codes)
        np.testing.assert_array_equal(stored[1][:, 0], scale)
        assert name not in model.graph.initializers
        assert model.metadata_props["nxm.embedding_sha256"] == embedding_hash(codes, scale)
        assert verify(graphs(family)).embedding == codes.shape
        floats = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
        assert all(list(value.shape or ()) != list(codes.shape) for value in floats)

    @pytest.mark.parametrize("family", EVERY_FAMILY)
    def test_outputs_are_those_of_the_float_table_bit_for_bit(self, family: str, graphs: Callable[..., Path]) -> None:
        """As written: code * scale is the checkpoint's float32 value, so nothing behind it may differ."""
        actual, expected = (onnx_text.run(graphs(family, kind), feeds(family)) for kind in ("int8", "float"))
        for name, output in expected.items():
            np.testing.assert_array_equal(actual[name], output)

    def test_the_file_is_smaller_by_three_bytes_an_entry_less_a_scale_a_row(self, graphs: Callable[..., Path]) -> None:
        (codes, _), sizes = (
            stored_embedding(load_graph(graphs()).graph, TABLE) or (np.zeros((0, 0)), None),
            [graphs("bert", kind).stat().st_size for kind in ("float", "int8")],
        )
        saved = codes.size * 3 - len(codes) * 4
        assert codes.size > 0
        assert abs(sizes[0] - sizes[1] - saved) < 2000  # names and attributes of the nodes, hash

    @pytest.mark.parametrize("dtype", variants(["float16", "bfloat16"], ()))
    def test_a_shorter_dtype_rounds_the_float32_product_once(
        self, dtype: str, graphs: Callable[..., Path], checkpoints: Callable[..., Path]
    ) -> None:
        """So rows are what a float table of that dtype would hold. (Not run: ONNX Runtime drops casts to float16 and
        back.)"""
        model, kind = load_graph(graphs(dtype=dtype)), np.dtype(getattr(ml_dtypes, dtype, dtype))
        cast, product = node(model.graph, f".{dtype}"), node(model.graph, "")
        assert (cast.op_type, cast.outputs[0].dtype) == ("Cast", ir.DataType.from_numpy(kind))
        assert (product.op_type, cast.inputs[0]) == ("Mul", product.outputs[0])
        codes, scale = stored_embedding(model.graph, TABLE) or pytest.fail("no table")
        table = open_checkpoint(checkpoints()).weight(TABLE)
        np.testing.assert_array_equal((codes * scale).astype(kind), table.astype(kind))

    @pytest.mark.parametrize(
        ("target", "dtype"), variants([("trt", np.float16), ("trt8", np.float32)], (("trt", np.float16),))
    )
    def test_tensorrt_targets_hold_the_same_values_in_float_and_their_plan_says_so(
        self, target: str, dtype: type, graphs: Callable[..., Path], checkpoints: Callable[..., Path]
    ) -> None:
        model = load_graph(graphs(target=target))
        table = model.graph.initializers[TABLE].const_value
        assert table is not None
        np.testing.assert_array_equal(table.numpy(), open_checkpoint(checkpoints()).weight(TABLE).astype(dtype))
        assert CompressionPlan.from_json(model.metadata_props["nxm.plan"]).embedding == "float"
        assert "nxm.embedding_sha256" not in model.metadata_props
        assert verify(graphs(target=target)).embedding is None

    def test_a_float_placement_holds_the_table_in_float(self, graphs: Callable[..., Path]) -> None:
        model = load_graph(graphs(placement="float"))
        assert TABLE in model.graph.initializers
        assert CompressionPlan.from_json(model.metadata_props["nxm.plan"]).embedding == "float"

    def test_onnx_runtime_keeps_it_in_int8(self, graphs: Callable[..., Path], tmp_path: Path) -> None:
        """Its optimizer folds constants when it loads a graph; what it has left then is what it holds in memory."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
        onnxruntime.InferenceSession(str(graphs()), options, providers=["CPUExecutionProvider"])
        constants = load_graph(tmp_path / "optimized.onnx").graph.initializers
        assert constants[f"{TABLE}_quantized"].dtype == ir.DataType.INT8
        shape = list(constants[f"{TABLE}_quantized"].shape or ())
        assert [list(value.shape or ()) for value in constants.values()].count(shape) == 1

    def test_openvino_keeps_it_in_int8(self, graphs: Callable[..., Path]) -> None:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
        from engines.openvino import backend as openvino

        file = graphs()
        layers = openvino._layers(openvino.compile_models(file, openvino.read_model(file, file.read_bytes()), 1).free)
        (codes,) = [layer for layer in layers if layer.names == f"{TABLE}_quantized"]
        assert (codes.kind, codes.precision) == ("Const", "i8")

    def test_a_table_that_something_else_reads_is_refused(self) -> None:
        graph = onnx_text.model(
            "g (int64[n] i) => (float[n, 2] y, float[3, 2] z) <float[3, 2] t = {1,2,3,4,5,6}>"
            "{ r = Gather(t, i) y = Identity(r) z = Neg(t) }"
        ).graph
        codes, scale = np.ones((3, 2), np.int8), np.ones(3, np.float32)
        with pytest.raises(ExportError, match=r"t feeds Neg node .* expected a Gather"):
            fold_int8_embedding(graph, "t", codes, scale, np.dtype(np.float32))
        with pytest.raises(ExportError, match="no initializer u;"):
            fold_int8_embedding(graph, "u", codes, scale, np.dtype(np.float32))


def constant(graph: ir.Graph, suffix: str, edit: Callable[[np.ndarray], Any]) -> None:
    """Change a copy of a constant of the table."""
    value = graph.initializers[f"{TABLE}{suffix}"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    changed = edit(array)
    array = array if changed is None else changed
    value.const_value = ir.tensor(array, name=value.name)
    value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)


def node(graph: ir.Graph, name: str) -> ir.Node:
    (match,) = [match for match in graph if match.name == f"{TABLE.removesuffix('.weight')}{name}"]
    return match


def whole_table(graph: ir.Graph) -> None:
    """Dequantize the table as a whole, then look up: right numbers, and a float table in memory."""
    codes, look_up = graph.initializers[f"{TABLE}_quantized"], node(graph, ".codes")
    cast = ir.node("Cast", [codes], attributes={"to": int(ir.DataType.FLOAT)}, name="all")
    graph.insert_before(look_up, cast)
    look_up.replace_input_with(0, cast.outputs[0])


def other_rows(graph: ir.Graph) -> None:
    """Scales of other tokens than those whose codes are looked up."""
    look_up = node(graph, ".scales")
    moved = ir.node("Neg", [look_up.inputs[1]], name="moved")
    graph.insert_before(look_up, moved)
    look_up.replace_input_with(1, moved.outputs[0])


class TestVerify:
    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                lambda graph: constant(graph, "_quantized", lambda codes: codes.__setitem__((5, 3), codes[5, 3] // 2)),
                "its codes and scales are not those of the checkpoint",
            ),
            (
                lambda graph: constant(graph, "_scale", lambda scale: scale.__setitem__((5, 0), 0.25)),
                "its codes and scales are not those of the checkpoint",
            ),
            (
                lambda graph: constant(graph, "_quantized", lambda codes: codes.__setitem__((5, 3), -128)),
                "a code is below -127",
            ),
            (
                lambda graph: constant(graph, "_scale", lambda scale: scale.__setitem__((5, 0), 0.0)),
                "a scale is not a positive number",
            ),
            (
                lambda graph: constant(graph, "_scale", lambda scale: scale[:-1]),
                "the graph has no INT8 codes with a float32 scale per row",
            ),
            (
                lambda graph: constant(graph, "_quantized", lambda codes: codes.astype(np.float32)),
                "the graph has no INT8 codes",
            ),
            (whole_table, "Cast node 'all' reads the whole table"),
            (other_rows, "is not cast and multiplied by the scales of the same tokens"),
            (
                lambda graph: node(graph, ".scales").replace_input_with(0, graph.initializers[f"{TABLE}_quantized"]),
                "is not cast and multiplied by the scales",
            ),
        ],
    )
    def test_one_thing_wrong_with_the_table_is_found_and_named(
        self, graphs: Callable[..., Path], tmp_path: Path, edit: Callable[[ir.Graph], Any], message: str
    ) -> None:
        model = load_graph(graphs())
        edit(model.graph)
        save_graph(model, tmp_path / "model.onnx")
        report = verify(tmp_path / "model.onnx")
        assert any(problem.startswith(f"{TABLE}: ") and message in problem for problem in report.problems)
        with pytest.raises(ExportError, match=TABLE):
            report.require()
        assert CliRunner().invoke(main, ["verify", str(tmp_path / "model.onnx")]).exit_code == 3

    def test_the_hash_of_an_older_graph_is_checked_too(self, graphs: Callable[..., Path], tmp_path: Path) -> None:
        model = load_graph(graphs())
        digest = model.metadata_props.pop("nxm.embedding_sha256")
        for recorded, passed in ((digest, True), ("0" * 64, False)):
            model.metadata_props["nxm.table"] = recorded  # as nxm-onnx/1 calls it
            save_graph(model, tmp_path / "model.onnx")
            assert verify(tmp_path / "model.onnx").passed is passed

    def test_a_float_table_under_an_int8_plan_is_refused(self, graphs: Callable[..., Path]) -> None:
        plan = CompressionPlan.from_json(load_graph(graphs()).metadata_props["nxm.plan"])
        problems = verify(graphs("bert", "float"), plan=plan).problems
        assert problems == (f"{TABLE}: planned INT8, and stored as FLOAT",)

    def test_a_plan_of_an_unknown_family_is_a_problem_and_no_traceback(self, graphs: Callable[..., Path]) -> None:
        plan = CompressionPlan.from_json(load_graph(graphs()).metadata_props["nxm.plan"])
        problems = verify(graphs(), plan=replace(plan, model_type="eurobert")).problems
        assert problems == ("the plan is for 'eurobert', a family whose embedding table is not known here",)

    def test_the_command_says_what_is_stored(self, graphs: Callable[..., Path]) -> None:
        done = CliRunner().invoke(main, ["verify", str(graphs())])
        assert (done.exit_code, "word-embedding table: INT8, 36x32, one scale per row" in done.output) == (0, True)
