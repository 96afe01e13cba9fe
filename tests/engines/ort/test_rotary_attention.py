"""Attention with rotated queries and keys as one operator: the numbers of the plain graph and of transformers, and no
touch to rotations of another form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import pytest

from engines.ort.graph_rewrites import FusedAttention, fused_attention, plain_attention
from nxm_export.contract.tasks import TASKS
from nxm_export.graph.exporter import export
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.hf.model_loading import load_task_model
from tests.support import baked, onnx_text, tiny
from tests.support.variants import variants

FAMILIES = ("modernbert", "nomic_bert", "gte", "jina_embeddings_v3")
HEADS, HEAD = 2, 4
# One head's angle for each half; queries, keys and values are thirds of one matrix's output.
ATTENTION = """
g (float[batch, sequence, 24] x, float[1, 1, sequence, sequence] bias, float[1, sequence, 2] angle,
   float[1, sequence, 2] other) => (float[batch, sequence, 8] y)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] four = {4},
 int64[5] parts = {0, 0, 3, 2, 4}, int64[3] joined = {0, 0, 8}, float scale = {0.5}>
{
  all = Reshape(x, parts)
  q0 = Slice(all, zero, one, two, one)
  q1 = Squeeze(q0, two)
  q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k0 = Slice(all, one, two, two, one)
  k1 = Squeeze(k0, two)
  k = Transpose<perm = [0, 2, 1, 3]>(k1)
  v0 = Slice(all, two, three, two, one)
  v1 = Squeeze(v0, two)
  v = Transpose<perm = [0, 2, 1, 3]>(v1)
  angles = Concat<axis = -1>(angle, angle)
  cosines = Cos(angles)
  sines = Sin(angles)
  cos = Unsqueeze(cosines, one)
  sin = Unsqueeze(sines, one)
  qa = Mul(q, cos)
  qb = Slice(q, zero, two, three, one)
  qc = Slice(q, two, four, three, one)
  qd = Neg(qc)
  qe = Concat<axis = -1>(qd, qb)
  qf = Mul(qe, sin)
  qr = Add(qa, qf)
  ka = Mul(k, cos)
  kb = Slice(k, zero, two, three, one)
  kc = Slice(k, two, four, three, one)
  kd = Neg(kc)
  ke = Concat<axis = -1>(kd, kb)
  kf = Mul(ke, sin)
  kr = Add(ka, kf)
  kt = Transpose<perm = [0, 1, 3, 2]>(kr)
  s = MatMul(qr, kt)
  sc = Mul(s, scale)
  sm = Add(sc, bias)
  p = Softmax<axis = -1>(sm)
  c = MatMul(p, v)
  ct = Transpose<perm = [0, 2, 1, 3]>(c)
  y = Reshape(ct, joined)
}
"""


def attention(text: str) -> ir.Model:
    model = onnx_text.model(text, opset=20)
    passes.ShapeInferencePass()(model)
    return model


def feeds_of(batch: int, sequence: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    bias = np.where(rng.random((1, 1, sequence, sequence)) < 0.5, 0.0, -1e4)
    bias[0, 0, 1] = -1e4  # of one query everything is masked
    feeds = {
        "x": rng.standard_normal((batch, sequence, 24)) * 2,
        "bias": bias,
        "angle": rng.uniform(-3, 3, (1, sequence, 2)),
        "other": rng.uniform(-3, 3, (1, sequence, 2)),
    }
    return {name: value.astype(np.float32) for name, value in feeds.items()}


@pytest.mark.parametrize("family", variants(FAMILIES, ("modernbert",)))
def test_a_rotary_family_runs_fused_with_the_numbers_of_the_plain_graph_and_of_transformers(
    family: str, tmp_path: Path
) -> None:
    """In float; with windows (ModernBERT's are 4 tokens to either side), padding, and a row that is padding alone."""
    import torch

    tiny.write_model(family, tmp_path / "model", head="classification")
    graph = export(tmp_path / "model", tmp_path / "graph").path
    feeds = baked.feeds(family, 6, 41, padding=17)
    feeds["attention_mask"][1] = 0
    plain, fused = load_graph(graph), load_graph(graph)
    assert plain_attention(plain.graph) == tiny.LAYERS
    assert fused_attention(fused) == FusedAttention(tiny.LAYERS, tiny.LAYERS, 0)
    assert not {"Softmax", "Neg"} & {node.op_type for node in fused.graph}
    expected, actual = (onnx_text.run(model, feeds)["logits"] for model in (plain, fused))
    np.testing.assert_allclose(actual, expected, atol=2e-6)  # float rounding, logits of about 1
    model = load_task_model(tmp_path / "model", TASKS["classification"])
    with torch.no_grad():
        theirs = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    read = [row for row in range(6) if row != 1]  # of a row of padding transformers reads all tokens alike
    np.testing.assert_allclose(actual[read], theirs[read], atol=2e-6)
    assert np.isfinite(actual).all()
    assert np.ptp(theirs[read]) > 0.05  # the rows say something


@pytest.mark.parametrize(("onnx_attention", "operator"), [(True, "Attention"), (False, "MultiHeadAttention")])
def test_a_fused_rotation_computes_what_the_plain_operators_do(onnx_attention: bool, operator: str) -> None:
    plain, fused = attention(ATTENTION), attention(ATTENTION)
    assert fused_attention(fused, onnx_attention=onnx_attention) == FusedAttention(1, 1, 0)
    assert sorted({node.op_type for node in fused.graph} - {"Cos", "Sin", "Slice", "Squeeze", "Concat"}) == [
        operator,
        "RotaryEmbedding",
        "Split",
    ]
    assert fused.opset_imports[""] == (23 if onnx_attention else 20)
    feeds = feeds_of(3, 7)
    expected = onnx_text.run(plain, feeds)["y"]
    np.testing.assert_allclose(onnx_text.run(fused, feeds)["y"], expected, atol=2e-6)
    assert not np.allclose(onnx_text.run(plain, {**feeds, "angle": feeds["other"]})["y"], expected, atol=0.1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Concat<axis = -1>(angle, angle)", "Concat<axis = -1>(angle, other)"),
        ("cosines = Cos(angles)", "c0 = Cos(angles)\n  cosines = Mul(c0, c0)"),
        ("qd = Neg(qc)", "qd = Abs(qc)"),
        ("Concat<axis = -1>(qd, qb)", "Concat<axis = -1>(qb, qd)"),
        ("Concat<axis = -1>(kd, kb)", "Concat<axis = -1>(kd, qb)"),
        ("qb = Slice(q, zero, two, three, one)", "qb = Slice(q, one, three, three, one)"),
        ("qc = Slice(q, two, four, three, one)", "qc = Slice(k, two, four, three, one)"),
        ("s = MatMul(qr, kt)", "kk = Transpose<perm = [0, 1, 3, 2]>(k)\n  s = MatMul(qr, kk)"),
        ("c = MatMul(p, v)", "c = MatMul(p, kr)"),
        ("float[1, 1, sequence, sequence] bias", "float[1, 1, 1, sequence] bias"),
        ("float[1, sequence, 2] angle", "float[1, 1, 2] angle"),
        ("c = MatMul(p, v)", "pt = Transpose<perm = [0, 1, 3, 2]>(p)\n  c = MatMul(pt, v)"),
    ],
    ids=[
        *("halves of other angles", "another function of cosines", "no negation", "halves not exchanged"),
        *("a half of another operand", "no half", "negated half of another operand", "only queries rotated"),
        *("rotated values", "a mask of keys", "one angle for all tokens", "probabilities turned"),
    ],
)
def test_rotations_of_another_form_are_left_alone(old: str, new: str) -> None:
    model = attention(ATTENTION.replace(old, new))
    assert old in ATTENTION
    assert fused_attention(model).fused == 0
    assert "RotaryEmbedding" not in {node.op_type for node in model.graph}


def test_thirds_are_put_where_they_were_cut() -> None:
    """Keys first, then queries, as another model may have it."""
    text = ATTENTION.replace("q0 = Slice(all, zero, one,", "q0 = Slice(all, one, two,")
    text = text.replace("k0 = Slice(all, one, two,", "k0 = Slice(all, zero, one,")
    plain, fused, feeds = attention(text), attention(text), feeds_of(2, 5)
    assert fused_attention(fused).rotary == 1
    np.testing.assert_allclose(onnx_text.run(fused, feeds)["y"], onnx_text.run(plain, feeds)["y"], atol=2e-6)
    assert not np.allclose(onnx_text.run(attention(ATTENTION), feeds)["y"], onnx_text.run(plain, feeds)["y"], atol=0.1)
