"""Weights stored as INT4 cost no CPU engine an integer product and no number a bit: by the names of the operators."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engines.base import BuildOptions, LoadOptions, backend
from engines.openvino.backend import OpenVinoFacts
from engines.ort.backend import OrtFacts
from engines.ort.session_levels import closest_level
from engines.parity.bisect import bisect
from engines.parity.compare import compare
from engines.passport import load_passport
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.io_spec import load_spec
from nxm_export.errors import EngineUnavailable
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from tests.support import baked, onnx_text
from tests.support.variants import variants

CASES = list(itertools.product(("ort", "openvino"), ("inputs", "inputs-outputs", "products", "attention")))
FEEDS = baked.feeds("bert", 5, 19, padding=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked.write_checkpoint("bert", tmp_path_factory.mktemp("w4") / "c", spec="2:4+W4", attention="int8")


@pytest.mark.parametrize(("runtime", "placement"), variants(CASES, lambda case: case[1] in ("inputs", "attention")))
def test_the_same_integer_operators_run_and_give_the_same_bits(
    checkpoint: Path, tmp_path: Path, runtime: str, placement: str
) -> None:
    facts, logits, sizes = [], [], []
    for stored in ("int8", "int4"):
        graph = export(checkpoint, tmp_path / f"{stored}-graph", placement=placement, weights_stored=stored)
        engine = tmp_path / stored
        engine.mkdir()
        try:
            passport = backend(runtime).build(graph.path, engine, BuildOptions(threads=1))
        except EngineUnavailable as error:
            pytest.skip(str(error))
        assert passport.graph.get("weights_stored") == (None if stored == "int8" else "int4")
        facts.append(backend(runtime).inspect(engine))
        with backend(runtime).load(engine, LoadOptions(threads=1)) as loaded:
            logits.append(loaded.run(FEEDS)["logits"])
        sizes.append((engine / "model.onnx").stat().st_size)
    np.testing.assert_array_equal(logits[1], logits[0])
    int8, int4 = (_operators(fact) for fact in facts)
    assert int4 == int8  # no Cast and no DequantizeLinear of a weight is left
    product = {"ort": "MatMulIntegerToFloat", "openvino": "FullyConnected i8"}[runtime]
    assert int4[product] >= len(open_checkpoint(checkpoint).plan.weights)
    assert sizes[1] < sizes[0]


def test_an_engine_of_int4_weights_agrees_with_its_checkpoint_block_by_block(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    tensors, rng = load_file(checkpoint / "model.safetensors"), np.random.default_rng(0)
    for name in tensors:  # of an untrained model they are all alike, and one constant in the graph
        if "LayerNorm" in name:
            tensors[name] += rng.uniform(-0.1, 0.1, tensors[name].shape).astype(np.float32)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    graph = export(checkpoint, tmp_path / "graph", placement="attention", weights_stored="int4").path
    build_engine(graph, tmp_path / "engine", "ort")
    samples = baked.features()
    assert compare(checkpoint, tmp_path / "engine", samples).passed
    report = bisect(checkpoint, tmp_path / "engine", samples)
    report.require()
    assert report.outputs_equal
    level = closest_level(tmp_path / "engine", load_passport(tmp_path / "engine"), load_spec(tmp_path / "engine"))
    assert level.integer_products == (8, 8)  # for Triton, which knows levels alone: six layers, two inside attention


def test_the_half_precision_graph_of_tensorrt_means_the_same_numbers(tmp_path: Path) -> None:
    checkpoint, logits = baked.write_checkpoint("bert", tmp_path / "c", spec="W4"), []
    for stored in ("int8", "int4"):
        graph = export(checkpoint, tmp_path / stored, target="trt", weights_stored=stored).path
        logits.append(onnx_text.run(graph, FEEDS)["logits"])
    np.testing.assert_array_equal(logits[1], logits[0])


def _operators(fact: object) -> Mapping[str, int]:
    assert isinstance(fact, (OrtFacts, OpenVinoFacts))
    return fact.operators
