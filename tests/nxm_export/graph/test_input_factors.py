"""Factors of input channels go from a checkpoint into its graph, through a packed file, and no damaged ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engines.reference import pytorch
from nxm_export.contract.checkpoint import Checkpoint, open_checkpoint
from nxm_export.contract.encoder_family import FFN, WIDE
from nxm_export.contract.packed_checkpoint import pack, unpack
from nxm_export.errors import ArtifactError
from nxm_export.graph.exporter import export
from nxm_export.graph.reading.graph_weights import graph_weights, load_graph
from nxm_export.graph.verifier import verify
from tests.support import baked, onnx_text


def with_factors(family: str, out: Path, seed: int = 0) -> Checkpoint:
    """A checkpoint whose FFNs read channels with factors from 1 to 8: the codes of one without, other weights."""
    baked.write_checkpoint(family, out, layers=2)
    checkpoint, rng = open_checkpoint(out), np.random.default_rng(seed)
    tensors, scales = load_file(out / "model.safetensors"), dict(checkpoint.scales)
    for block in checkpoint.family.blocks(checkpoint.config):
        for tensor in (FFN, WIDE):
            readers = checkpoint.family.readers(block, tensor)
            factors = np.exp2(rng.integers(0, 4, checkpoint.plan.shapes[readers[0]][1])).astype(np.float32)
            for name in readers:
                tensors[name] = tensors[name] / factors
                scales[f"{name.removesuffix('.weight')}.input_factors"] = factors
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    save_file(scales, out / "nxm_scales.safetensors")
    return open_checkpoint(out)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("bert", "cpu"),
        *(pytest.param(family, "cpu", marks=pytest.mark.slow) for family in ("albert", "modernbert", "gte")),
        *(pytest.param("bert", target, marks=pytest.mark.slow) for target in ("trt", "trt8")),
    ],
)
def test_a_graph_divides_and_holds_the_codes(tmp_path: Path, family: str, target: str) -> None:
    checkpoint = with_factors(family, tmp_path / "checkpoint")
    checkpoint.require_valid()
    graph = export(checkpoint.path, tmp_path / "graph", target=target, placement="inputs-outputs").path
    verify(graph, plan=checkpoint.plan).require()
    model = load_graph(graph)
    divisions = [node for node in model.graph if str(node.name).partition(".use")[0].endswith(".input_divide")]
    assert len(divisions) == 2 * len(checkpoint.family.runs(checkpoint.config))
    assert {user.op_type for node in divisions for user in node.outputs[0].consumers()} <= {"QuantizeLinear", "Reshape"}
    if target != "cpu":
        return
    stored = {weight.name.removesuffix("_quantized"): weight.matrix for weight in graph_weights(model)}
    for name in checkpoint.plan.weights:
        parts = [stored[part] for part in ([name] if name in stored else checkpoint.family.parts(name))]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), checkpoint.codes(name).T)
    feeds = baked.feeds(family, 4, 9, padding=4)
    outputs = onnx_text.run(graph, feeds)
    with pytorch.load(checkpoint.path, task="classification", exact=True) as reference:
        expected = reference.run(feeds)["logits"]
    # As for every graph: a code that moves by one step changes a sample by a few thousandths, and most have none.
    np.testing.assert_allclose(outputs["logits"], expected, atol=0.02 * max(1.0, float(np.abs(expected).max())))
    assert (np.abs(outputs["logits"] - expected) < 1e-5).all(axis=1).mean() >= 0.5


def test_packing_gives_the_same_files_back(tmp_path: Path) -> None:
    checkpoint = with_factors("bert", tmp_path / "checkpoint")
    pack(checkpoint.path, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    for name in ("model.safetensors", "nxm_scales.safetensors"):
        before, after = load_file(checkpoint.path / name), load_file(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        for key, array in before.items():
            assert array.tobytes() == after[key].tobytes(), key


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.full(32, 3.0), "must be 32 powers of two"),
        (np.full(31, 2.0), "must be 32 powers of two"),
        (np.full(32, np.nan), "must be 32 powers of two"),
        (np.full(32, 4.0), "different input factors"),  # the other reader has none like them
    ],
)
def test_damaged_factors_are_named(tmp_path: Path, factors: np.ndarray, message: str) -> None:
    checkpoint = with_factors("gte", tmp_path / "checkpoint")
    scales = dict(checkpoint.scales)
    name = next(key for key in scales if key.endswith("mlp.up_proj.input_factors"))
    weight = load_file(checkpoint.path / "model.safetensors")
    path = name.replace("input_factors", "weight")
    if factors.shape == (32,):
        weight[path] = weight[path] * scales[name] / factors.astype(np.float32)
        save_file(weight, checkpoint.path / "model.safetensors", {"format": "pt"})
    save_file(scales | {name: factors.astype(np.float32)}, checkpoint.path / "nxm_scales.safetensors")
    with pytest.raises(ArtifactError, match=f"({message}|NaN)"):
        open_checkpoint(checkpoint.path).require_valid()
