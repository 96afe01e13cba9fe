"""Graphs for TensorRT mean what was trained: every preset, family and lowering gives the numbers of PyTorch's fake
quantizers."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from engines.reference import pytorch
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import GRAPH_PLACEMENTS, PLACEMENTS, CompressionPlan, WeightSpec
from nxm_export.errors import ArtifactError, ExportError, PlanError
from nxm_export.graph.exporter import export
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.graph.reading.sparsity_scan import scan_products
from tests.support import tiny
from tests.support.trt_models import Checkpoints, feeds_for
from tests.support.variants import placements_of, variants

# Float32 sums in another order differ by a few units in the last place (1e-7 at logits of about 1); a code that moved
# by one step would change them by 1e-3 or more, and the inputs here are chosen by seed so that none lies that close to
# a boundary.
CLOSE = 2e-5
ONE_CODE = 0.02  # what these logits move by when rounding puts a code on the next step


def require_same(actual: np.ndarray, expected: np.ndarray, what: str = "") -> None:
    """Two runtimes round sums differently, so a code may land one step off; a sample without one agrees to rounding."""
    gap = np.abs(actual - expected)
    assert gap.max() < ONE_CODE, what
    assert (gap.max(axis=1) < CLOSE).any(), what


def run_onnx(file: Path, batch: int = 4, sequence: int = 16) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graph as it is written
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feeds = feeds_for([value.name for value in session.get_inputs()], batch, sequence)
    return np.asarray(session.run(None, feeds)[0])


def nodes(file: Path) -> list[str]:
    return [node.op_type for node in onnx.load(file).graph.node]


@pytest.mark.parametrize(
    ("family", "placement"),
    variants(
        [(name, placement) for name, family in FAMILIES.items() for placement in placements_of(family)],
        lambda pair: pair[0] == "bert",
        slow=tuple(itertools.product(tiny.DISTINCT, PLACEMENTS)),
    ),
)
def test_every_preset_of_every_family_means_the_same_in_pytorch_and_onnx(
    checkpoints: Checkpoints, tmp_path: Path, family: str, placement: str
) -> None:
    shared = placement != "inputs" and not FAMILIES[family].pre_norm
    checkpoint = checkpoints(family, placement, residual="int8" if shared else "float")
    trained = torch.load(checkpoint / "fake_quant_logits.pt").numpy()
    for lowering in ("matmul", "gemm", "conv1x1") if family in tiny.SHORT else ("matmul",):
        done = export(checkpoint, tmp_path / lowering, target="trt", dtype="float32", lowering=lowering)
        require_same(run_onnx(done.path), trained, lowering)
    with pytorch.load(checkpoint, task="classification") as reference:
        actual = reference.run(feeds_for(reference.inputs, 4, 16))["logits"]
    require_same(actual, trained)


def test_presets_are_not_all_the_same_network(checkpoints: Checkpoints) -> None:
    """The comparison above could not fail otherwise."""
    logits = [torch.load(checkpoints("bert", name) / "fake_quant_logits.pt").numpy() for name in PLACEMENTS]
    logits.append(torch.load(checkpoints("bert", "inputs", residual="int8") / "fake_quant_logits.pt").numpy())
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert np.abs(one - other).max() > 100 * CLOSE


@pytest.mark.parametrize("gelu", ["gelu", "gelu_pytorch_tanh"])
def test_the_gelu_that_was_trained_is_the_one_in_the_graph(checkpoints: Checkpoints, tmp_path: Path, gelu: str) -> None:
    checkpoint = checkpoints("bert", "inputs-outputs", gelu=gelu)
    done = export(checkpoint, tmp_path / "graph", target="trt", dtype="float32")
    model = load_graph(done.path)
    expected = "tanh" if "tanh" in gelu else "erf"
    assert model.metadata_props["nxm.gelu"] == expected
    wide = next(fact for fact in scan_products(model, "").facts if fact.name.endswith("intermediate.dense.weight"))
    assert (wide.epilogue, wide.output) == (f"gelu_{expected}", "int8")
    require_same(run_onnx(done.path), torch.load(checkpoint / "fake_quant_logits.pt").numpy())


@pytest.mark.parametrize("lowering", variants(["matmul", "gemm", "conv1x1"], ("matmul", "conv1x1")))
def test_target_trt8_is_opset_17_with_float_weights_behind_their_own_quantizers(
    checkpoints: Checkpoints, tmp_path: Path, lowering: str
) -> None:
    checkpoint = checkpoints("bert", "attention")
    done = export(checkpoint, tmp_path / "graph", target="trt8", lowering=lowering)
    model = onnx.load(done.path)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 17
    onnx.checker.check_model(model, full_check=True)
    stored = {value.name: value.data_type for value in model.graph.initializer if value.name.endswith("_dense")}
    assert len(stored) == 6
    assert set(stored.values()) == {onnx.TensorProto.FLOAT}
    assert done.report.passed
    assert {weight.pattern for weight in done.report.weights if weight.planned} == {"2:4"}, "seen through the quantizer"
    require_same(run_onnx(done.path), torch.load(checkpoint / "fake_quant_logits.pt").numpy())


@pytest.mark.parametrize("lowering", ["gemm", "conv1x1"])
def test_between_the_ffns_products_no_reshape_is_left(checkpoints: Checkpoints, tmp_path: Path, lowering: str) -> None:
    """Otherwise product, GELU and quantizer are no neighbours, and nothing fuses them."""
    done = export(checkpoints("bert", "inputs-outputs"), tmp_path / "graph", target="trt", lowering=lowering)
    graph = onnx.load(done.path).graph
    producer = {name: node for node in graph.node for name in node.output}
    node = next(node for node in graph.node if node.name.endswith("0.output.dense"))
    seen = []
    while not node.name.endswith("intermediate.dense"):
        node = producer[node.input[0]]
        seen.append(node.op_type)
    assert seen == ["DequantizeLinear", "QuantizeLinear", "Gelu", "Gemm" if lowering == "gemm" else "Conv"]


def test_issue_4694_and_its_fix_are_two_presets(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Q/DQ on inputs only lets FP16 leave every product, and there is no sparse kernel for that; with outputs, INT8
    leaves."""
    checkpoint = checkpoints("bert", "inputs-outputs")
    outputs = {}
    for placement in ("inputs", "inputs-outputs"):
        done = export(checkpoint, tmp_path / placement, target="trt", placement=placement)
        outputs[placement] = {
            fact.output for fact in scan_products(load_graph(done.path), "").facts if fact.planned_sparse
        }
    assert outputs == {"inputs": {"float16", "int8"}, "inputs-outputs": {"int8"}}, (
        "GELU's output is the next input: INT8"
    )


def test_precision_overrides_compute_layernorm_and_softmax_in_another_dtype(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoint = checkpoints("bert", "inputs-outputs")
    done = export(checkpoint, tmp_path / "graph", target="trt", precision_overrides="float32")
    model = onnx.shape_inference.infer_shapes(onnx.load(done.path), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
        if node.op_type == "MatMul":
            assert types[node.output[0]] == onnx.TensorProto.FLOAT16
    with pytest.raises(ExportError, match="weakly typed"):
        export(checkpoint, tmp_path / "no", target="trt8", precision_overrides="float16")
    with pytest.raises(ExportError, match="other than the graph's float16"):
        export(checkpoint, tmp_path / "no", target="trt", precision_overrides="float16")


def test_int8_attention_ends_at_512_tokens(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints("bert", "attention", positions=600)

    def placement(out: str, **options: Any) -> str:
        done = export(checkpoint, tmp_path / out, target="trt", dtype="float32", **options)
        return load_graph(done.path).metadata_props["nxm.placement"]

    assert placement("long") == "inputs-outputs"
    assert placement("short", max_length=512) == "attention"
    assert json.loads((tmp_path / "short" / "spec.json").read_text())["max_length"] == 512
    with pytest.raises(ExportError, match="at most 512 tokens, and this graph takes 600"):
        placement("asked", placement="attention")
    with pytest.raises(ExportError, match=r"max length 601 is outside 2\.\.600"):
        placement("longer", max_length=601)


def test_a_graph_may_drop_quantizers_and_never_adds_any(checkpoints: Checkpoints, tmp_path: Path) -> None:
    full = checkpoints("bert", "attention", residual="int8")
    counts = []
    for placement in GRAPH_PLACEMENTS:
        done = export(full, tmp_path / placement, target="trt", placement=placement)
        counts.append(done.report.quantize_nodes)
    assert counts == [0, 4, 9, 8, 10], "none; 4 tensors read by planned products; 5 written; all read by products; all"
    with pytest.raises(PlanError, match="trained attention in float"):
        export(checkpoints("bert", "inputs-outputs"), tmp_path / "no", target="trt", placement="attention")


def test_the_float_graph_of_a_compressed_checkpoint_keeps_its_zeros(checkpoints: Checkpoints, tmp_path: Path) -> None:
    done = export(checkpoints("bert", "inputs-outputs"), tmp_path / "graph", target="trt", placement="float")
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(nodes(done.path))
    assert {weight.pattern for weight in done.report.weights if weight.planned} == {"2:4"}


def test_plans_say_residual_only_where_there_is_one_and_read_it_back() -> None:
    family = FAMILIES["bert"]
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    spec = WeightSpec.parse("2:4+W8")
    plain = family.uniform_plan(config, spec)
    rich = family.uniform_plan(config, spec, placement="attention", residual="int8")
    assert "residual" not in json.loads(plain.to_json())
    for plan in (plain, rich):
        assert CompressionPlan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="attention int8 needs output_bits 8 on every query, key and value"):
        family.uniform_plan(config, spec, placement="attention", keep_dense=("*.key.weight",))
    with pytest.raises(PlanError, match="residual int8 shares the quantizers"):
        family.uniform_plan(config, WeightSpec.parse("2:4"), placement="inputs", residual="int8")


@pytest.mark.parametrize("placement", ["ffn-only", "attention"])
def test_a_plan_of_patterns_alone_or_of_the_ffn_alone_says_what_it_leaves(placement: str) -> None:
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    plan = FAMILIES["bert"].uniform_plan(config, WeightSpec.parse("2:4+W8"), placement=placement)
    bits = {name.split(".layer.0.")[1]: spec.weight_bits for name, spec in plan.weights.items()}
    attention = {value for name, value in bits.items() if name.startswith("attention")}
    assert attention == ({None} if placement == "ffn-only" else {8})
    assert bits["intermediate.dense.weight"] == bits["output.dense.weight"] == 8
    assert {str(spec.pattern) for spec in plan.weights.values()} == {"2:4"}


def test_a_shared_tensor_with_two_scales_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("bert", "inputs"), checkpoint)
    scales = load_file(checkpoint / "nxm_scales.safetensors")
    scales["bert.encoder.layer.0.attention.self.key.input_scale"] *= 2
    save_file(scales, checkpoint / "nxm_scales.safetensors")
    with pytest.raises(ArtifactError, match="read the same tensor with different input scales"):
        export(checkpoint, tmp_path / "graph", target="trt")
