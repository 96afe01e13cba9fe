"""Checkpoints become graphs: every family with every task, and in each graph the checkpoint's codes, bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from engines.reference import pytorch
from nxm_export.contract.checkpoint import Checkpoint, open_checkpoint
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.quantizer_placement import at_placement
from nxm_export.contract.tasks import TASKS
from nxm_export.graph.apply_plan import SOFTMAX_SCALE
from nxm_export.graph.exporter import Exported, export
from nxm_export.graph.reading.graph_weights import graph_weights, load_graph
from nxm_export.graph.targets import TARGETS
from nxm_export.graph.verifier import embedded_plan, verify
from tests.support import baked, onnx_text, tiny
from tests.support.dev_features import dev_features
from tests.support.variants import variants

# A new family or task is exported and compared here by itself.
PAIRS = [pair for pair in itertools.product(FAMILIES, TASKS) if pair[1] not in FAMILIES[pair[0]].missing_heads]


class Made:
    """Exports made once for this file: tracing takes nearly all the time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: dict[str, tuple[Path, Path]] = {}
        self.done: dict[Path, Exported] = {}  # by graph directory

    def __call__(self, family: str, *, options: dict[str, Any] | None = None, **checkpoint: Any) -> tuple[Path, Path]:
        """(checkpoint directory, graph directory)"""
        key = f"{family} {sorted(checkpoint.items())} {sorted((options or {}).items())}"
        if key not in self.paths:
            path, graph = (self.root / f"{kind}-{len(self.paths)}" for kind in ("checkpoint", "graph"))
            baked.write_checkpoint(family, path, **checkpoint)
            self.paths[key], self.done[graph] = (path, graph), export(path, graph, **(options or {}))
        return self.paths[key]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("exports"))


@pytest.fixture
def exported(
    made: Made, tiny_checkpoint: Callable[..., Path], tiny_graph: Callable[..., Path], family: str, task: str
) -> tuple[Checkpoint, Path]:
    """(checkpoint, its graph directory): a trained classifier with float attention, or an untrained model of any other
    task with INT8 attention, so that every family that can have it has both."""
    if task == "classification":
        return open_checkpoint(tiny_checkpoint(family)), tiny_graph(family, "inputs-outputs")
    int8 = FAMILIES[family].attention.quantizable
    options = {"placement": "attention" if int8 else "inputs-outputs"}
    path, graph = made(family, task=task, attention="int8" if int8 else "float", options=options)
    return open_checkpoint(path), graph


def nodes(model: ir.Model, op: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op]


def constant(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def names(checkpoint: Checkpoint, weight: str) -> tuple[str, ...]:
    """What a graph of these checkpoints calls a weight: a fused one has an output quantizer for each part, if any."""
    return checkpoint.family.parts(weight) if checkpoint.plan.weights[weight].output_bits else (weight,)


# Beside all of BERT's; the rest is for `make test-slow`.
SHORT_PAIRS = (("roberta", "classification"), ("albert", "classification"))


# The same model as for classification, with other numbers of outputs: `make test-slow` tries a family with one of them.
SAME_HEAD = ("regression", "multi-label", "reranking")


def marked(pair: tuple[str, str]) -> Any:
    """A pair with the mark of the command that runs it."""
    family, task = pair
    if family == "bert" or pair in SHORT_PAIRS:
        return pytest.param(*pair)
    turn = SAME_HEAD[list(FAMILIES).index(family) % len(SAME_HEAD)]
    in_turn = task == turn or task not in SAME_HEAD
    often = task in ("token-classification", "embedding") if family in tiny.ALIKE else in_turn
    return pytest.param(*pair, marks=[pytest.mark.slow if often else pytest.mark.exhaustive])


@pytest.mark.parametrize(("family", "task"), [marked(pair) for pair in PAIRS])
class TestEveryFamilyAndTask:
    def test_the_graph_holds_the_checkpoints_codes_and_scales(self, exported: tuple[Checkpoint, Path]) -> None:
        checkpoint, graph = exported
        model = load_graph(graph / "model.onnx")
        verify(graph / "model.onnx", plan=checkpoint.plan).require()
        by_name = {weight.name.removesuffix("_quantized"): weight for weight in graph_weights(model)}
        for name in checkpoint.plan.weights:
            parts = [by_name[part] for part in names(checkpoint, name)]
            np.testing.assert_array_equal(np.concatenate([part.matrix for part in parts], 1), checkpoint.codes(name).T)
            scales = [part.scale for part in parts if part.scale is not None]
            np.testing.assert_array_equal(np.concatenate(scales), checkpoint.weight_scale(name))
            assert {(part.matrix.dtype, part.scale_axis) for part in parts} == {(np.dtype(np.int8), "N")}

    def test_products_are_named_by_their_module(self, exported: tuple[Checkpoint, Path]) -> None:
        checkpoint, graph = exported
        model = load_graph(graph / "model.onnx")
        named = {weight.node.name: weight.name for weight in graph_weights(model)}
        for name in (part for weight in checkpoint.plan.weights for part in names(checkpoint, weight)):
            assert named[name.removesuffix(".weight")] == f"{name}_quantized"

    def test_query_key_and_value_read_one_pair(self, exported: tuple[Checkpoint, Path]) -> None:
        checkpoint, graph = exported
        model = load_graph(graph / "model.onnx")
        products = {node.name: node for node in nodes(model, "MatMul")}
        for block in checkpoint.family.blocks(checkpoint.config):
            readers = checkpoint.family.readers(block, "block")
            paths = [part.removesuffix(".weight") for name in readers for part in names(checkpoint, name)]
            inputs = {id(products[path].inputs[0]) for path in paths}
            assert len(inputs) == 1
            (pair_,) = {products[path].inputs[0].producer() for path in paths}  # type: ignore[union-attr]
            assert pair_ is not None
            assert pair_.op_type == "DequantizeLinear"
            assert float(constant(pair_.inputs[1])) == pytest.approx(checkpoint.input_scale(readers[0]), rel=1e-7)

    def test_every_planned_quantizer_is_there_once(self, exported: tuple[Checkpoint, Path]) -> None:
        checkpoint, graph = exported
        model = load_graph(graph / "model.onnx")
        specs = checkpoint.plan.weights
        runs = len(checkpoint.family.runs(checkpoint.config))
        uses = runs // len(checkpoint.family.blocks(checkpoint.config))  # of a weight that its layers share
        family = checkpoint.family
        shared = len(family.linears) - len(family.tensors())  # as key and value share the pair of query
        inputs = sum(spec.input_bits is not None for spec in specs.values()) * uses - shared * runs
        outputs = sum(len(family.parts(name)) for name, spec in specs.items() if spec.output_bits) * uses
        softmax = runs if checkpoint.plan.attention == "int8" else 0
        operands = 0 if family.operands_are_outputs else 2 * softmax  # the value leaves its layer in INT8
        assert len(nodes(model, "QuantizeLinear")) == inputs + outputs + softmax + operands
        scales = [float(constant(node.inputs[1])) for node in nodes(model, "QuantizeLinear")]
        assert sum(scale == np.float32(SOFTMAX_SCALE) for scale in scales) == softmax

    def test_inputs_outputs_and_opset_are_as_said(
        self, exported: tuple[Checkpoint, Path], family: str, task: str
    ) -> None:
        _, graph = exported
        model, spec = load_graph(graph / "model.onnx"), load_spec(graph)
        assert [value.name for value in model.graph.inputs] == list(tiny.inputs(family)) == list(spec.inputs)
        for value in model.graph.inputs:
            assert value.dtype == ir.DataType.INT64
            assert [str(size) for size in value.shape or []] == ["batch", "sequence"]
        sizes = {"scores": "1", "classes": str(len(tiny.CLASSES.get(task, "01"))), "labels": "3"}
        sizes["hidden"] = str(tiny.HIDDEN)
        for output, (name, axes) in zip(model.graph.outputs, TASKS[task].outputs.items(), strict=True):
            assert (output.name, output.dtype, [str(size) for size in output.shape or []]) == (
                name,
                ir.DataType.FLOAT,
                [sizes.get(axis, axis) for axis in axes],
            )
        assert spec.outputs == TASKS[task].outputs
        assert len(spec.labels) == {"embedding": 0, "reranking": 1}.get(task, len(spec.labels))
        assert model.opset_imports[""] == TARGETS["cpu"].opset
        assert set(model.opset_imports) == {""}
        assert (spec.task, spec.max_length, spec.pad_id) == (task, tiny.POSITIONS, tiny.pad_id(family))
        files = {"model.onnx", "spec.json", "tokenizer.json", "verify.json", "origin.json"}
        assert {path.name for path in graph.iterdir()} == files

    @pytest.mark.parametrize(
        ("batch", "sequence", "padding"), [(1, 1, 0), (1, tiny.POSITIONS, 0), (4, 9, 4), (3, 2, 1)]
    )
    def test_onnx_runtime_and_pytorch_agree(
        self, exported: tuple[Checkpoint, Path], family: str, task: str, batch: int, sequence: int, padding: int
    ) -> None:
        """Unoptimized, so that every node runs as written. Where no code moves both differ by float32 rounding alone; a
        code that moves by one step changes these outputs by a few thousandths."""
        checkpoint, graph = exported
        feeds = baked.feeds(family, batch, sequence, padding=padding)
        outputs = onnx_text.run(graph / "model.onnx", feeds)
        with pytorch.load(checkpoint.path, task=task, exact=True) as reference:
            answers = reference.run(feeds)
        assert set(outputs) == set(answers) == set(TASKS[task].outputs)
        for actual, expected in ((outputs[name], answers[name]) for name in answers):
            assert actual.shape == expected.shape
            np.testing.assert_allclose(actual, expected, atol=0.02 * max(1.0, float(np.abs(expected).max())))
            if batch > 1:
                assert (np.abs(actual - expected) < 1e-5).reshape(batch, -1).all(axis=1).mean() >= 0.5

    def test_a_row_of_padding_alone_is_finite(self, exported: tuple[Checkpoint, Path], family: str) -> None:
        _, graph = exported
        feeds = baked.feeds(family, 2, 6)
        feeds["attention_mask"][0] = 0
        both = onnx_text.run(graph / "model.onnx", feeds)
        alone = onnx_text.run(graph / "model.onnx", {name: array[1:] for name, array in feeds.items()})
        for name, outputs in both.items():
            assert np.isfinite(outputs).all()
            np.testing.assert_allclose(outputs[1], alone[name][0], atol=1e-5)  # rows do not see each other


@pytest.mark.parametrize("placement", ["inputs", "inputs-outputs"])
@pytest.mark.parametrize("family", variants(FAMILIES, ("bert", "albert"), slow=tiny.DISTINCT))
def test_a_trained_model_of_each_family_runs_alike_in_both_runtimes(
    family: str,
    placement: str,
    tiny_checkpoint: Callable[..., Path],
    tiny_graph: Callable[..., Path],
) -> None:
    """On its real dev sentences, as ONNX Runtime optimizes the plain file."""
    from engines.parity.parts import run_all

    checkpoint, graph = tiny_checkpoint(family), tiny_graph(family, placement)
    spec, plan = load_spec(graph), at_placement(open_checkpoint(checkpoint).plan, placement)
    features = dev_features(checkpoint, graph)

    class Graph:
        inputs, outputs = spec.inputs, tuple(spec.outputs)

        def run(self, feeds: Any) -> Any:
            return onnx_text.run(graph / "model.onnx", feeds, optimize=True)

    actual = run_all(Graph(), features, spec)["logits"]  # type: ignore[arg-type]
    for exact in (False, True):
        with pytorch.load(checkpoint, task=spec.task, plan=plan, exact=exact) as reference:
            expected = run_all(reference, features, spec)["logits"]
        assert (actual.argmax(-1) == expected.argmax(-1)).all()
        error = np.abs(actual - expected).max(axis=-1)
        assert np.median(error) < 1e-5  # no code moved in most sentences
        assert error.max() < 0.1 * np.abs(expected).max()
    labels = np.array([sample["labels"] for sample in features])
    assert (actual.argmax(-1) == labels).mean() > 0.8  # it learned something, so the comparison means something


class TestSharedLayers:
    """ALBERT: three layers of two blocks, so that one runs twice and the other once; with INT8 attention and
    residual."""

    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("shared")
        baked.write_checkpoint("albert", out, layers=3, attention="int8", options={"num_hidden_groups": 2})
        plan = json.loads((out / "nxm_plan.json").read_text())
        (out / "nxm_plan.json").write_text(json.dumps({**plan, "residual": "int8"}))
        return out

    @pytest.mark.parametrize(
        ("target", "placement", "lowering"),
        variants(
            [
                *itertools.product(TARGETS, ("inputs", "inputs-outputs", "products", "attention"), ("matmul",)),
                ("cpu", "inputs-outputs", "gemm"),
                ("trt", "inputs-outputs", "conv1x1"),
            ],
            lambda case: case in (("cpu", "attention", "matmul"), ("cpu", "inputs-outputs", "gemm")),
        ),
    )
    def test_a_shared_weight_is_stored_once_and_every_use_has_the_same_scales(
        self,
        checkpoint: Path,
        tmp_path: Path,
        target: str,
        placement: str,
        lowering: str,
    ) -> None:
        opened = open_checkpoint(checkpoint)
        plan = at_placement(opened.plan, placement)
        done = export(checkpoint, tmp_path / "graph", target=target, placement=placement, lowering=lowering)
        model, uses = load_graph(done.path), [2, 1]
        stored = "_dense" if target == "trt8" else "_quantized"
        for block, count in zip(opened.family.blocks(opened.config), uses, strict=True):
            for name in (name for name in plan.weights if name.startswith(f"{block}.")):
                path = name.removesuffix(".weight")
                read = [weight for weight in graph_weights(model) if weight.name == f"{name}{stored}"]
                assert len(read) == count
                assert [weight.node.name for weight in read] == [path, f"{path}.use2"][:count]
                assert sum(key.startswith(f"{name}{stored}") for key in model.graph.initializers) == 1
                pairs = [node for node in nodes(model, "QuantizeLinear") if (node.name or "").startswith(f"{path}.")]
                scales = {id(node.inputs[1]) for node in pairs if ".output" in str(node.name)}
                assert len(scales) == (plan.weights[name].output_bits is not None)
        assert len([row for row in done.report.weights if row.planned]) == len(plan.weights)
        if target == "cpu":
            feeds = baked.feeds("albert", 6, 12, padding=4)
            actual = onnx_text.run(done.path, feeds)["logits"]
            with pytorch.load(checkpoint, task="classification", plan=plan, exact=True) as reference:
                expected = reference.run(feeds)["logits"]
            # as above: most rows differ by float32 rounding alone, and a code that moves shows in the second digit
            np.testing.assert_allclose(actual, expected, atol=0.02 * max(1.0, float(np.abs(expected).max())))
            assert (np.abs(actual - expected) < 1e-5).all(axis=1).mean() >= 0.5


class TestTensorRtTarget:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_the_whole_graph_is_in_its_dtype(self, made: Made, dtype: str) -> None:
        path, graph = made("bert", options={"target": "trt", "dtype": dtype})
        checkpoint, model = open_checkpoint(path), load_graph(graph / "model.onnx")
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        assert model.opset_imports[""] == 21
        assert model.metadata_props["nxm.placement"] == "inputs-outputs"
        floats = {str(value.dtype) for value in model.graph.initializers.values()} - {"INT8", "INT64", "INT32", "BOOL"}
        assert floats == {str(ir.DataType.from_numpy(kind))}
        assert all(str(value.dtype) == "FLOAT" for value in model.graph.outputs)
        for name in checkpoint.plan.weights:
            stored = constant(model.graph.initializers[f"{name}_scale"])
            assert stored.dtype == kind
            np.testing.assert_array_equal(stored, checkpoint.weight_scale(name).astype(kind))
            codes = constant(model.graph.initializers[f"{name}_quantized"])
            np.testing.assert_array_equal(codes, checkpoint.codes(name).T)

    def test_the_rounding_of_scales_is_measured(self, made: Made) -> None:
        path, graph = made("bert", options={"target": "trt", "dtype": "float16"})
        checkpoint, done = open_checkpoint(path), made.done[graph]
        scales = np.concatenate([np.atleast_1d(scale) for scale in checkpoint.scales.values()])
        worst = np.max(np.abs(scales.astype(np.float16).astype(np.float32) - scales) / scales)
        assert done.scale_rounding == pytest.approx(float(worst))
        assert 0 < worst <= 2.0**-11  # half a unit in the last place of float16
        assert done.bytes == done.path.stat().st_size

    @pytest.mark.parametrize("family", variants(("bert", "modernbert", "deberta-v2"), ("bert",)))  # by kind of mask
    def test_half_precision_computes_nearly_the_same(self, made: Made, family: str) -> None:
        """ONNX Runtime runs the float16 graph on the CPU, node by node; the reference has its scales rounded, too."""
        path, graph = made(family, options={"target": "trt", "dtype": "float16"})
        feeds = baked.feeds(family, 8, 12, padding=3)
        feeds["attention_mask"][1] = 0
        actual = onnx_text.run(graph / "model.onnx", feeds)["logits"]
        assert np.isfinite(actual).all()
        with pytorch.load(path, task="classification", scale_dtype="float16", exact=True) as reference:
            expected = reference.run(feeds)["logits"]
        rows = [row for row in range(8) if row != 1]  # what a row of padding alone gives is nobody's business
        np.testing.assert_allclose(actual[rows], expected[rows], atol=0.05)  # codes move by half precision sums


class TestPlans:
    @pytest.fixture(scope="class")
    def mixed(self, made: Made) -> tuple[Path, Path]:
        """Low bits, a pattern alone, and dense weights side by side, at the target's own placement."""
        specs = {"*.key.weight": "2:4", "*.query.weight": "dense", "*.intermediate.dense.weight": "dense"}
        return made("bert", spec="1:4+W3", specs=specs)

    def test_every_weight_follows_its_own_spec_under_its_own_name(self, mixed: tuple[Path, Path]) -> None:
        checkpoint, model = open_checkpoint(mixed[0]), load_graph(mixed[1] / "model.onnx")
        rows = {row.name: row for row in verify(mixed[1] / "model.onnx").weights}
        by_name = {weight.name.removesuffix("_quantized"): weight for weight in graph_weights(model)}
        for name, spec in checkpoint.plan.weights.items():
            assert by_name[name].node.name == name.removesuffix(".weight")
            assert (rows[name].stored, rows[name].planned) == ("INT8" if spec.weight_bits else "FLOAT", str(spec))
            expected = checkpoint.codes(name) if spec.weight_bits else checkpoint.weight(name)
            np.testing.assert_array_equal(by_name[name].matrix, expected.T)
        assert {row.pattern for name, row in rows.items() if name.endswith("key.weight")} == {"2:4"}
        products = {node.name: node for node in nodes(model, "MatMul")}
        for role, quantized in (("query", False), ("key", False), ("value", True)):
            producer = products[f"bert.encoder.layer.0.attention.self.{role}"].inputs[0].producer()  # type: ignore[union-attr]
            assert (producer is not None and producer.op_type == "DequantizeLinear") == quantized

    def test_mixed_plans_run_alike_in_both_runtimes(self, mixed: tuple[Path, Path]) -> None:
        feeds = baked.feeds("bert", 4, 10, padding=2)
        plan = at_placement(open_checkpoint(mixed[0]).plan, "inputs")
        with pytorch.load(mixed[0], task="classification", plan=plan, exact=True) as reference:
            expected = reference.run(feeds)["logits"]
        actual = onnx_text.run(mixed[1] / "model.onnx", feeds)["logits"]
        np.testing.assert_allclose(actual, expected, atol=0.02)  # a code or two may move by a step

    def test_the_default_placement_is_the_targets_or_all_that_was_trained(
        self, made: Made, mixed: tuple[Path, Path]
    ) -> None:
        cpu, all_of_it = mixed[1], made("bert", task="regression", attention="int8", options={"target": "trt"})[1]
        placements = [load_graph(graph / "model.onnx").metadata_props["nxm.placement"] for graph in (cpu, all_of_it)]
        assert placements == ["inputs", "attention"]

    def test_the_plan_in_the_file_is_the_one_that_was_exported(self, mixed: tuple[Path, Path]) -> None:
        plan = embedded_plan(load_graph(mixed[1] / "model.onnx"), "x")
        assert plan == at_placement(open_checkpoint(mixed[0]).plan, "inputs")
        assert json.loads((mixed[1] / "verify.json").read_text())["file"] == "model.onnx"


def test_a_dense_model_gives_a_float_graph_with_names(tmp_path: Path) -> None:
    path = tiny.write_model("distilbert", tmp_path / "dense", head="classification", classes=("a", "b", "c"), layers=1)
    done = export(path, tmp_path / "graph")
    model = load_graph(done.path)
    assert not nodes(model, "QuantizeLinear")
    assert {"distilbert.transformer.layer.0.ffn.lin1"} <= {node.name for node in nodes(model, "MatMul")}
    assert load_spec(tmp_path / "graph").labels == ("a", "b", "c")
    assert model.metadata_props["nxm.placement"] == "float"
    assert "nxm.plan" not in model.metadata_props
