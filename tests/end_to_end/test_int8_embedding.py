"""The INT8 word-embedding table: its grid, training on it, its checkpoint, its graph, its engine and its packed
form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file
from torch import nn

from compressors.models import load_model, resolve
from compressors.quantization.embedding import QuantEmbedding, quant_embeddings, row_codes
from compressors.quantization.prepare_bake import bake, prepare
from compressors.settings import Settings
from compressors.training.compress import compress
from compressors.training.resume import request_hash
from engines.parity.compare import compare
from engines.parity.gates import parse_gate
from nxm_export.cli import main
from nxm_export.contract import packed_checkpoint
from nxm_export.contract.checkpoint import open_checkpoint, read_tensor
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.quantizer_placement import at_placement
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, read_metrics, read_metrics_of
from nxm_export.contract.tasks import TASKS
from nxm_export.data.examples import Features
from nxm_export.errors import ArtifactError, DataError, ExportError
from nxm_export.graph.exporter import TARGETS, export
from nxm_export.graph.int8_embedding import embedding_hash, fold_int8_embedding, stored_embedding
from nxm_export.graph.reading.graph_weights import load_graph, save_graph
from nxm_export.graph.verifier import verify
from nxm_export.pipeline.engine_commands import build_engine
from nxm_export.storage.json_files import encode
from tests.support import baked, onnx_text, tiny
from tests.support.variants import variants

TABLE = FAMILIES["bert"].word_embedding
EVERY_FAMILY = variants(FAMILIES, ("bert",), slow=tiny.DISTINCT)
SMALLEST = np.finfo(np.float32).smallest_normal
# Rows of any size that training could leave, and all the odd ones: zeros, subnormal numbers, one value among zeros.
ROWS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32)
    | st.floats(-(2.0**-126), 2.0**-126, width=32)
    | st.sampled_from([0.0, 1.0]),
)


def by_definition(row: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """(codes, scale) of one row, in float64 but for the scale."""
    scale = max(np.float32(np.abs(row).max() / np.float32(127)), SMALLEST)
    return np.clip(np.rint((row / scale).astype(np.float64)), -127, 127), scale


class TestGrid:
    @given(ROWS)
    def test_codes_and_scales_are_those_of_the_definition_and_come_back_from_the_rounded_table(self, rows: Any) -> None:
        codes, scales = (tensor.numpy() for tensor in row_codes(torch.from_numpy(rows)))
        for row, actual, scale in zip(rows, codes, scales, strict=True):
            expected, expected_scale = by_definition(row)
            np.testing.assert_array_equal(actual, expected)
            assert scale == expected_scale
        assert (scales >= SMALLEST).all()
        assert np.isfinite(scales).all()
        assert not np.signbit(codes[codes == 0]).any()
        np.testing.assert_array_equal(np.rint(codes * scales / scales), codes)
        # half a step, and the rounding of the product: as near as the grid allows
        assert (np.abs(codes * scales - rows) <= scales * np.float32(0.5 + 1e-4)).all()

    @pytest.mark.parametrize("row", [[0.0] * 4, [-0.0] * 4, [1e-45, -1e-45, 0.0, 0.0], [3e-39, -1e-40, 0.0, 0.0]])
    def test_a_row_without_a_normal_number_has_codes_0_and_a_scale(self, row: list[float]) -> None:
        codes, scales = row_codes(torch.tensor([row]))
        assert codes.tolist() == [[0.0] * 4]
        assert scales.item() == SMALLEST

    def test_a_row_of_one_value_has_it_as_its_largest_code(self) -> None:
        codes, scales = row_codes(torch.diag(torch.tensor([0.3, -7.0, 1e-20])))
        assert codes.tolist() == [[127, 0, 0], [0, -127, 0], [0, 0, 127]]
        torch.testing.assert_close((codes * scales).diag(), torch.tensor([0.3, -7.0, 1e-20]), rtol=1e-6, atol=0)


class TestModule:
    def test_rows_are_those_of_the_rounded_table_and_the_gradient_that_of_a_plain_one(self) -> None:
        torch.manual_seed(0)
        plain = nn.Embedding(11, 6, padding_idx=2)
        rounded = QuantEmbedding(nn.Embedding(11, 6, padding_idx=2), "x.weight")
        rounded.weight = nn.Parameter(plain.weight.detach().clone())
        ids, upstream = torch.tensor([[1, 2, 3], [3, 3, 10]]), torch.randn(2, 3, 6)
        codes, scales = row_codes(plain.weight.detach())
        actual = rounded(ids)
        assert torch.equal(actual, (codes * scales)[ids])
        for rows in (actual, plain(ids)):
            (rows * upstream).sum().backward()
        assert plain.weight.grad is not None
        assert rounded.weight.grad is not None
        assert torch.equal(rounded.weight.grad, plain.weight.grad)
        assert not rounded.weight.grad[2].any()  # padding is not trained
        rounded.rounds = False
        assert torch.equal(rounded(ids), plain(ids))

    @pytest.mark.parametrize("family", variants(FAMILIES, tiny.SHORT))
    def test_baking_puts_a_plain_table_with_the_very_rows_that_training_saw(self, family: str, tmp_path: Path) -> None:
        source = resolve(tiny.write_model(family, tmp_path, head="classification"))
        plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"), embedding="int8")
        model: Any = load_model(source, TASKS["classification"])
        before = model.get_parameter(source.family.word_embedding).detach().clone()
        assert tuple(before.shape) == source.family.word_embedding_shape(source.config)
        prepare(model, plan, source.family, source.config)
        assert len(quant_embeddings(model)) == 1
        ids = torch.arange(len(before))[None]
        rows = model.get_input_embeddings()(ids)
        scales = bake(model, plan)
        assert type(model.get_input_embeddings()) is nn.Embedding
        assert torch.equal(model.get_input_embeddings()(ids), rows)
        codes, expected = row_codes(before)
        np.testing.assert_array_equal(scales[f"{source.family.word_embedding}_scale"], expected[:, 0].numpy())
        assert torch.equal(rows[0].detach(), codes * expected)
        assert not torch.equal(rows[0].detach(), before)


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny compressed checkpoint with an INT8 table, trained; the dense model and the data beside it. Read it
    only."""
    return tiny_checkpoint("bert", embedding="int8")


def run(trained: Path, out: Path, embedding: str = "int8", progress: Any = lambda *_: None, **settings: Any) -> Any:
    source = resolve(trained.parent / "dense")
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"), embedding=embedding)
    options: dict[str, Any] = {
        "recipe": "nxm",
        "steps": 6,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "calibration_samples": 32,
    }
    train, dev = (str(trained.parent / f"{split}.tsv") for split in ("train", "dev"))
    chosen = Settings(**{**options, "precision": "fp32", **settings})
    return compress(
        source.path, task="classification", train=train, dev=dev, plan=plan, out=out, settings=chosen, progress=progress
    )


@pytest.fixture(scope="module")
def retrained(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its table trained, too."""
    out = tmp_path_factory.mktemp("retrained") / "checkpoint"
    run(trained, out, freeze_embeddings=False)
    return out


class TestTraining:
    def test_a_frozen_table_is_the_dense_one_on_its_grid(self, trained: Path) -> None:
        checkpoint = open_checkpoint(trained)
        checkpoint.require_valid()
        assert checkpoint.plan.embedding == "int8"
        codes, scales = row_codes(torch.from_numpy(read_tensor(trained.parent / "dense", TABLE)))
        np.testing.assert_array_equal(checkpoint.codes(TABLE), codes.numpy().astype(np.int8))
        np.testing.assert_array_equal(checkpoint.weight_scale(TABLE), scales[:, 0].numpy())
        np.testing.assert_array_equal(checkpoint.weight(TABLE), (codes * scales).numpy())

    def test_a_trained_table_moves_and_is_on_its_grid(self, trained: Path, retrained: Path) -> None:
        checkpoint = open_checkpoint(retrained)
        checkpoint.require_valid()
        assert (checkpoint.codes(TABLE) != open_checkpoint(trained).codes(TABLE)).mean() > 0.1

    def test_what_the_table_costs_by_itself_is_measured(self, trained: Path) -> None:
        metrics = read_metrics(trained)
        assert isinstance(metrics, CompressionMetrics)
        assert metrics.embedding_table_drop is not None
        assert metrics.embedding_table_drop_interval is not None
        low, high = metrics.embedding_table_drop_interval
        assert low <= metrics.embedding_table_drop <= high
        assert abs(metrics.embedding_table_drop) <= 100 * 2 / tiny.DEV_SAMPLES  # two samples of an easy task

    def test_a_float_plan_measures_nothing_of_the_kind(self, tiny_checkpoint: Callable[..., Path]) -> None:
        metrics = read_metrics(tiny_checkpoint("bert"))
        assert isinstance(metrics, CompressionMetrics)
        assert (metrics.embedding_table_drop, metrics.embedding_table_drop_interval) == (None, None)

    @pytest.mark.slow
    def test_an_interrupted_run_ends_where_one_without_interruption_does(
        self, trained: Path, retrained: Path, tmp_path: Path
    ) -> None:
        def interrupted(phase: str, done: int, steps: int) -> None:
            if phase == "qat":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(trained, tmp_path / "resumed", progress=interrupted, freeze_embeddings=False)
        assert list((tmp_path / ".resumed.work").glob("admm*.safetensors"))  # a finished phase
        run(trained, tmp_path / "resumed", freeze_embeddings=False)
        weights = [(path / "model.safetensors").read_bytes() for path in (tmp_path / "resumed", retrained)]
        assert weights[0] == weights[1]

    def test_the_request_names_the_option(self, trained: Path) -> None:
        source, plan = resolve(trained.parent / "dense"), open_checkpoint(trained).plan
        hashes = {request_hash(source, [], chosen) for chosen in (plan, replace(plan, embedding="float"))}
        assert len(hashes) == 2

    def test_sentence_embeddings_pack_and_unpack_too(
        self, tiny_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        checkpoint = tiny_checkpoint("bert", task="embedding", embedding="int8", steps=3)
        assert open_checkpoint(checkpoint).plan.embedding == "int8"
        packed_checkpoint.pack(checkpoint, tmp_path / "packed")
        unpacked = packed_checkpoint.unpack(tmp_path / "packed", tmp_path / "unpacked")
        assert (unpacked / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


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


class TestCheckpoint:
    @pytest.fixture
    def copy(self, checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
        return shutil.copytree(checkpoints(), tmp_path / "copy")

    @pytest.mark.parametrize(
        ("file", "key", "edit", "message"),
        [
            ("model", TABLE, lambda table: table * np.float32(1.001), "weights are not code"),
            ("model", TABLE, lambda table: table * np.nan, "holds NaN or infinite values"),
            ("nxm_scales", f"{TABLE}_scale", lambda scale: scale[:-1], "must be 36 positive numbers"),
            (
                "nxm_scales",
                f"{TABLE}_scale",
                lambda scale: scale * np.float32(0.5),
                "has a code of 254, beyond the planned 127",
            ),
            (
                "nxm_scales",
                f"{TABLE}_scale",
                None,
                "the plan needs .*word_embeddings.weight_scale, and it is not there",
            ),
        ],
    )
    def test_a_table_off_its_grid_is_refused(self, copy: Path, file: str, key: str, edit: Any, message: str) -> None:
        tensors = load_file(copy / f"{file}.safetensors")
        value = tensors.pop(key)
        save_file(
            {**tensors, **({} if edit is None else {key: edit(value)})}, copy / f"{file}.safetensors", {"format": "pt"}
        )
        with pytest.raises(ArtifactError, match=message):
            open_checkpoint(copy).require_valid()

    def test_packing_is_lossless_at_the_size_of_the_formula(self, copy: Path, tmp_path: Path) -> None:
        sizes = packed_checkpoint.pack(copy, tmp_path / "packed")
        assert 0 <= sizes.payload_bytes - sizes.formula_bytes <= 2 * 7  # each packed tensor ends on a whole byte
        unpacked = packed_checkpoint.unpack(tmp_path / "packed", tmp_path / "unpacked")
        for name in ("model.safetensors", "nxm_scales.safetensors", "nxm_plan.json"):
            assert (unpacked / name).read_bytes() == (copy / name).read_bytes()
        plan = open_checkpoint(copy).plan
        (copy / "nxm_plan.json").write_text(replace(plan, embedding="float").to_json())
        tokens, features = open_checkpoint(copy).weight(TABLE).shape
        in_float = packed_checkpoint.pack(copy, tmp_path / "float").payload_bytes
        assert in_float - sizes.payload_bytes == 3 * tokens * features  # both hold the scales

    @pytest.mark.parametrize("spoil", ["values", "scale"])
    def test_a_packed_file_without_the_table_is_damaged(self, copy: Path, tmp_path: Path, spoil: str) -> None:
        from safetensors import safe_open

        packed_checkpoint.pack(copy, tmp_path / "packed")
        with safe_open(tmp_path / "packed", framework="numpy") as stream:
            metadata, tensors = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        key = f"{TABLE}.values" if spoil == "values" else f"scale/{TABLE}_scale"
        tensors[key] = tensors[key][:-1]
        shapes = json.loads(metadata["scale_shapes"])
        shapes[f"{TABLE}_scale"] = [len(tensors[f"scale/{TABLE}_scale"])]
        whole = {
            "scale_shapes": json.dumps(shapes),
            "sha256": packed_checkpoint._digest(tensors),
        }  # as if it had been packed so
        save_file(tensors, tmp_path / "spoilt", {**metadata, **whole})
        with pytest.raises(ArtifactError, match=r"word_embeddings\.weight"):
            packed_checkpoint.unpack(tmp_path / "spoilt", tmp_path / "out")


class TestPlan:
    def test_a_plan_says_embedding_only_where_it_is_int8_and_an_older_one_is_float(self, trained: Path) -> None:
        plan = open_checkpoint(trained).plan
        assert json.loads(plan.to_json())["embedding"] == "int8"
        assert CompressionPlan.from_json(plan.to_json()) == plan
        older = json.loads(plan.to_json())
        del older["embedding"]
        assert CompressionPlan.from_json(json.dumps(older)) == replace(plan, embedding="float")
        assert json.loads(replace(plan, embedding="float").to_json()) == older

    def test_every_placement_keeps_it_but_float(self, trained: Path) -> None:
        plan = open_checkpoint(trained).plan
        placements = {
            placement: at_placement(plan, placement).embedding for placement in ("inputs", "inputs-outputs", "float")
        }
        assert placements == {"inputs": "int8", "inputs-outputs": "int8", "float": "float"}

    def test_compression_of_the_matrices_does_not_count_it(self, trained: Path) -> None:
        plan = open_checkpoint(trained).plan
        assert plan.compression("packed") == replace(plan, embedding="float").compression("packed")


class TestEngine:
    @pytest.fixture(scope="class")
    def engine(self, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("engine")
        export(trained, out / "graph")
        build_engine(out / "graph" / "model.onnx", out / "ort")
        return out / "ort"

    @pytest.fixture(scope="class")
    def features(self) -> list[Features]:
        return baked.features()

    def test_it_passes_parity_and_its_passport_names_the_table(
        self, trained: Path, engine: Path, features: list[Any]
    ) -> None:
        report = compare(trained, engine, features, gates=[parse_gate("embedding_table<=5")])
        assert report.passed
        passport = json.loads((engine / "passport.json").read_text())
        checkpoint = open_checkpoint(trained)
        assert passport["plan"]["embedding"] == "int8"
        assert passport["graph"]["embedding_sha256"] == embedding_hash(
            checkpoint.codes(TABLE), checkpoint.weight_scale(TABLE)
        )

    @pytest.mark.parametrize(("cost", "passed"), [(0.5, True), (0.6, False)])
    def test_the_gate_holds_what_the_table_cost_against_its_limit(
        self, trained: Path, engine: Path, features: list[Any], tmp_path: Path, cost: float, passed: bool
    ) -> None:
        copy = shutil.copytree(trained, tmp_path / "checkpoint")
        metrics = replace(read_metrics_of(CompressionMetrics, copy), embedding_table_drop=cost)
        (copy / "metrics.json").write_text(encode(metrics.to_dict()), encoding="utf-8")
        report = compare(copy, engine, features, gates=[parse_gate("embedding_table<=0.5")])
        assert (report.passed, report.gates[0].passed) == (passed, passed)

    def test_the_gate_is_refused_where_the_cost_is_not_known(
        self, trained: Path, engine: Path, features: list[Any], tmp_path: Path
    ) -> None:
        copy = shutil.copytree(trained, tmp_path / "checkpoint")
        metrics = json.loads((copy / "metrics.json").read_text())
        for cost, error, message in (
            (None, DataError, "has no embedding_table_drop"),
            (float("nan"), ArtifactError, "NaN is"),
        ):
            (copy / "metrics.json").write_text(json.dumps({**metrics, "embedding_table_drop": cost}))
            with pytest.raises(error, match=message):
                compare(copy, engine, features, gates=[parse_gate("embedding_table<=0.5")])

    def test_the_gate_is_refused_where_no_table_was_rounded(
        self, tiny_checkpoint: Callable[..., Path], tiny_engine: Callable[..., Path], features: list[Any]
    ) -> None:
        with pytest.raises(DataError, match=r"a gate on embedding_table needs a checkpoint that .* --embedding int8"):
            compare(tiny_checkpoint(), tiny_engine(), features, gates=[parse_gate("embedding_table<=0.5")])


class TestCommands:
    def test_a_dry_run_counts_it(self, trained: Path) -> None:
        parent = trained.parent
        arguments = ["run", str(parent / "dense"), "--train", str(parent / "train.tsv")]
        arguments += ["--dev", str(parent / "dev.tsv"), "--out", str(parent / "none"), "--dry-run", "--json"]
        estimates = []
        for embedding in ("float", "int8"):
            done = CliRunner().invoke(main, [*arguments, "--embedding", embedding])
            assert done.exit_code == 0, done.output
            estimates.append(json.loads(done.stdout))
        tokens, features = open_checkpoint(trained).weight(TABLE).shape
        assert estimates[0]["onnx_bytes"] - estimates[1]["onnx_bytes"] == tokens * features * 3 - tokens * 4
        assert [estimate["embedding"] for estimate in estimates] == ["float", "int8"]

    def test_an_unknown_kind_is_wrong_usage(self) -> None:
        for command in ("run", "compress", "search"):
            done = CliRunner().invoke(main, [command, "--embedding", "int4", "x", "--out", "y"])
            assert done.exit_code == 2
