"""A fused matrix becomes a product for each part: the same numbers, under the parts' names, in every target that wants
it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.reference import pytorch
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.encoder_family import part_name
from nxm_export.errors import ExportError
from nxm_export.graph.exporter import export
from nxm_export.graph.fused_parts import split_products
from nxm_export.graph.reading.graph_weights import GraphWeight, graph_weights, load_graph, parameter_of
from nxm_export.graph.reading.sparsity_scan import scan_products
from nxm_export.graph.targets import TARGETS
from nxm_export.graph.verifier import verify
from tests.support import baked, onnx_text
from tests.support.variants import variants

HEADS, FEATURES = 2, 3  # of a part in the generated graphs


def fused(parts: int, *, views: bool, bias: bool, uses: int = 1, taken: str | None = None) -> ir.Model:
    """``x @ w.T (+ b)`` taken apart, all parts then added with different factors; whole numbers, so that sums in any
    order are exact. `taken` replaces the lines that take the parts."""
    rng, out, k = np.random.default_rng(parts), parts * HEADS * FEATURES, 4
    named = {"w": rng.integers(-9, 10, (out, k)), "b": rng.integers(-9, 10, out)}
    constants = [f"float[{','.join(map(str, x.shape))}] {name} = {{{_row(x)}}}" for name, x in named.items()]
    numbers = {"c": parts, **{f"i{n}": n for n in range(parts + 1)}}
    constants += [f"int64[1] {name} = {{{number}}}" for name, number in numbers.items()]
    constants += [f"float[1] f{n} = {{{n + 1}}}" for n in range(parts)]
    constants += ["int64[1] axis = {-3}"]
    constants += [f"int64[5] split = {{0, 0, {parts}, {HEADS}, {FEATURES}}}"]
    body, sums = [], []
    for use in range(uses):
        body += [f"t{use} = Transpose<perm = [1, 0]>(w)", f"m{use} = MatMul(x{use}, t{use})"]
        body += [f"y{use} = {'Add' if bias else 'Sum'}(m{use}{', b' if bias else ''})"] if bias else []
        written = f"y{use}" if bias else f"m{use}"
        if taken is not None:
            body.append(taken.format(written=written))
        elif views:
            body.append(f"v{use} = Reshape({written}, split)")
            for n in range(parts):
                body.append(f"s{use}_{n} = Slice(v{use}, i{n}, i{n + 1}, axis)")
                body.append(f"p{use}_{n} = Squeeze(s{use}_{n}, axis)")
        else:
            body.append(f"v{use} = SplitToSequence<axis = -1>({written}, chunk1)")
            body += [f"p{use}_{n} = SequenceAt(v{use}, n{n})" for n in range(parts)]
        body += [f"q{use}_{n} = Mul(p{use}_{n}, f{n})" for n in range(parts)]
        body.append(f"z{use} = Sum({', '.join(f'q{use}_{n}' for n in range(parts))})")
        sums.append(f"z{use}")
    constants += [f"int64 chunk1 = {{{HEADS * FEATURES}}}", *(f"int64 n{n} = {{{n}}}" for n in range(parts))]
    inputs = ", ".join(f"float[batch, sequence, {k}] x{use}" for use in range(uses))
    shape = f"batch, sequence, {HEADS}, {FEATURES}" if views else f"batch, sequence, {HEADS * FEATURES}"
    outputs = ", ".join(f"float[{shape}] {name}" for name in sums)
    text = f"g ({inputs}) => ({outputs}) <{', '.join(constants)}> {{ {'; '.join(body)} }}".replace(";", "\n")
    return onnx_text.model(text)


def _row(x: np.ndarray) -> str:
    return ", ".join(str(number) for number in x.reshape(-1))


@given(parts=st.integers(2, 4), views=st.booleans(), bias=st.booleans(), uses=st.integers(1, 2))
@settings(max_examples=24, deadline=None)
def test_split_products_write_the_same_numbers(parts: int, views: bool, bias: bool, uses: int) -> None:
    model = fused(parts, views=views, bias=bias, uses=uses)
    feeds = {
        f"x{use}": np.random.default_rng(use).integers(-9, 10, (2, 3, 4)).astype(np.float32) for use in range(uses)
    }
    whole = onnx_text.run(model, feeds)
    passes.ShapeInferencePass()(model)  # as a trace knows shapes
    names = [f"w.{number}" for number in range(parts)]
    split_products(model.graph, "w", names)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    split = onnx_text.run(model, feeds)
    assert whole.keys() == split.keys()
    for name, expected in whole.items():
        assert np.array_equal(split[name], expected)
    assert not {"SplitToSequence", "Slice"} & {node.op_type for node in model.graph}
    assert sum(node.op_type == "MatMul" for node in model.graph) == parts * uses
    assert set(names) <= set(model.graph.initializers)
    assert "w" not in model.graph.initializers


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ("p0_0 = Relu({written})\np0_1 = Identity(p0_0)", "w: the exported graph reads it by Relu"),
        ("v0 = Reshape({written}, split)\np0_0 = Gather<axis = 2>(v0, n0)\np0_1 = Identity(p0_0)",
         "takes its parts by Gather"),
        ("v0 = Reshape({written}, split)\ns0 = Slice(v0, i0, i1, axis)\np0_0 = Squeeze(s0, axis)\n"
         "p0_1 = Identity(p0_0)", "leaves out a part"),
        ("v0 = Reshape({written}, split)\ns0 = Slice(v0, i0, i1, i1)\np0_0 = Squeeze(s0, i1)\np0_1 = Identity(p0_0)",
         "slices along another axis"),
        ("v0 = SplitToSequence<axis = -1>({written}, chunk1)\np0_0 = SequenceAt(v0, n0)\np0_1 = Identity(p0_0)",
         "leaves out a part"),
    ],
)  # fmt: skip
def test_a_graph_that_takes_the_parts_otherwise_is_refused(taken: str, message: str) -> None:
    model = fused(2, views="Reshape" in taken, bias=False, taken=taken)
    passes.ShapeInferencePass()(model)
    with pytest.raises(ExportError, match=message):
        split_products(model.graph, "w", ["w.0", "w.1"])


def found(graph: Path) -> dict[str, GraphWeight]:
    return {parameter_of(weight.name): weight for weight in graph_weights(load_graph(graph))}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a bias at every matrix, and INT8 outputs."""
    options = {"attention_bias": True, "mlp_bias": True, "norm_bias": True}
    return baked.write_checkpoint("modernbert", tmp_path_factory.mktemp("biased") / "checkpoint", options=options)


@pytest.mark.parametrize(
    ("target", "lowering", "placement"),
    variants(
        [
            *((target, "matmul", "inputs") for target in TARGETS),
            ("trt", "gemm", "inputs-outputs"),
            ("trt", "conv1x1", "inputs-outputs"),
            ("trt8", "matmul", "inputs-outputs"),
        ],
        (("trt", "gemm", "inputs-outputs"),),
    ),
)
def test_the_parts_hold_the_rows_of_the_fused_matrix_and_mean_what_pytorch_does(
    biased: Path, tmp_path: Path, target: str, lowering: str, placement: str
) -> None:
    checkpoint = open_checkpoint(biased)
    done = export(biased, tmp_path / "graph", target=target, lowering=lowering, placement=placement, dtype="float32")
    weights, facts = found(done.path), {fact.name: fact for fact in scan_products(load_graph(done.path), "graph").facts}
    for block in checkpoint.family.blocks(checkpoint.config):
        for path, parts in (("attn.Wqkv", ("query", "key", "value")), ("mlp.Wi", ("input", "gate"))):
            name = f"{block}.{path}.weight"
            names = (name,) if target == "cpu" else tuple(part_name(name, part) for part in parts)
            assert ({name, *(part_name(name, part) for part in parts)} & set(weights)) == set(names)
            codes = np.concatenate([weights[part].matrix.T for part in names])
            np.testing.assert_array_equal(codes, checkpoint.codes(name))
            for part in names:
                assert weights[part].node.name == part.removesuffix(".weight")
                assert (facts[part].planned, facts[part].planned_sparse) == ("2:4+W8", True)
                assert (facts[part].output == "int8") == (placement == "inputs-outputs")
    feeds = baked.feeds("modernbert", 4, 9, padding=3)
    actual = onnx_text.run(done.path, feeds)["logits"]
    plan = load_graph(done.path).metadata_props["nxm.plan"]
    with pytorch.load(
        biased, task="classification", plan=type(checkpoint.plan).from_json(plan), exact=True
    ) as reference:
        expected = reference.run(feeds)["logits"]
    # Float32 sums in another order, unless a code moves by one step, which changes a row by a few thousandths.
    np.testing.assert_allclose(actual, expected, atol=0.02 * max(1.0, float(np.abs(expected).max())))
    assert (np.abs(actual - expected) < 1e-5).all(axis=1).mean() >= 0.5


def test_a_part_that_is_missing_or_broken_is_found_under_its_name(biased: Path, tmp_path: Path) -> None:
    done = export(biased, tmp_path / "graph", target="trt")
    model = load_graph(done.path)
    key = "model.layers.0.attn.Wqkv.key.weight_quantized"
    stored = model.graph.initializers[key]
    assert stored.const_value is not None
    stored.const_value = ir.tensor(np.ones(stored.const_value.shape.numpy(), np.int8), name=key)
    ir.save(model, tmp_path / "broken.onnx")
    problems = verify(tmp_path / "broken.onnx").all_problems
    assert any("Wqkv.key.weight" in problem and "not 2:4 along K" in problem for problem in problems), problems
    for value in (stored, model.graph.initializers["model.layers.0.mlp.Wi.gate.weight_quantized"]):
        value.name = f"other.{value.name}"
    ir.save(model, tmp_path / "renamed.onnx")
    problems = verify(tmp_path / "renamed.onnx").all_problems
    for name in ("model.layers.0.attn.Wqkv.key.weight", "model.layers.0.mlp.Wi.gate.weight"):
        assert f"{name} is planned and not in the graph under its name" in problems


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nomic_bert", "modernbert"])
def test_int8_attention_without_output_quantizers_of_its_operands_still_reads(family: str, tmp_path: Path) -> None:
    """Attention then has a quantizer of its own for every operand, as all checkpoints of rotary families once had."""
    path = baked.write_checkpoint(family, tmp_path / "c", placement="inputs", attention="int8")
    scales = open_checkpoint(path).operand_scales(open_checkpoint(path).family.blocks({"num_hidden_layers": 1})[0])
    assert list(scales) == ["query", "key", "value"]
    done = export(path, tmp_path / "g", placement="products")
    operands = [node.name for node in load_graph(done.path).graph if str(node.name).endswith("value_quantize")]
    assert len(operands) == 1
    feeds = baked.feeds(family, 4, 9, padding=3)
    actual = onnx_text.run(done.path, feeds)["logits"]
    with pytorch.load(path, task="classification", exact=True) as reference:
        np.testing.assert_allclose(actual, reference.run(feeds)["logits"], atol=0.02)


@pytest.mark.slow
def test_w4_parts_are_stored_as_int4(tmp_path: Path) -> None:
    path = baked.write_checkpoint("modernbert", tmp_path / "c", spec="W4")
    done = export(path, tmp_path / "g", target="trt", weights_stored="int4")
    assert {weight.stored for weight in done.report.weights if weight.planned} == {"INT4"}
    assert (
        json.loads(load_graph(done.path).metadata_props["nxm.plan"])["weights"].keys()
        == open_checkpoint(path).plan.weights.keys()
    )
