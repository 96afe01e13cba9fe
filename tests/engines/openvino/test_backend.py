"""OpenVINO runs the exported file as it stands, in float32 where it is float, and its execution graph proves the
rest."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engines.base import BuildOptions, LoadOptions, backend
from engines.openvino import backend as openvino_backend
from engines.parity.bisect import bisect
from engines.parity.parts import open_part
from engines.parity.tolerance import QUANTIZER_ROUNDING
from engines.passport import load_passport
from engines.reference import pytorch
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import INT8_ATTENTION
from nxm_export.contract.quantizer_placement import placement_of
from nxm_export.data.columns import Columns
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.labelled_texts import features_of
from tests.support import baked, onnx_text, tiny
from tests.support.variants import placements_of, variants

pytest.importorskip("openvino", reason="OpenVINO is not installed; pip install 'nxm-export[openvino]'")

# x (batch, 4) in codes of 0.0371, times the identity: what comes out are the codes.
CODES = """
g (float[batch, 4] x) => (float[batch, 4] y)
<float s = {0.0371}, int8 z = {0}, float[4] ws = {1, 1, 1, 1}, int8[4] wz = {0, 0, 0, 0},
 int8[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{
  q = QuantizeLinear(x, s, z)
  a = DequantizeLinear(q, s, z)
  m = DequantizeLinear<axis = 1>(w, ws, wz)
  y = MatMul(a, m)
}
"""


def test_the_engine_file_is_the_exported_graph_byte_for_byte(
    tiny_graph: Callable[..., Path], tiny_engine: Callable[..., Path]
) -> None:
    graph = tiny_graph("bert", "inputs") / "model.onnx"
    assert (tiny_engine("openvino", "bert", "inputs") / "model.onnx").read_bytes() == graph.read_bytes()


def test_the_execution_graph_names_every_product_and_its_precision(tiny_engine: Callable[..., Path]) -> None:
    directory = tiny_engine("openvino", "bert", "inputs")
    passport = load_passport(directory)
    assert (passport.options["planned_products"], passport.options["integer_products"]) == (12, 12)
    assert passport.options["float_products"] == []
    products = {product.name.partition("/")[0]: product for product in openvino_backend.inspect(directory).products}
    query = products["bert.encoder.layer.0.attention.self.query"]
    assert query.precision == "i8"
    assert "i8" in query.kernel
    outside = {product.precision for name, product in products.items() if not name.startswith("bert.encoder")}
    assert outside == {"f32"}


def test_a_planned_product_that_runs_in_float_is_named(tiny_graph: Callable[..., Path], tmp_path: Path) -> None:
    """The pair in front of one product is taken away: its weight is still INT8 in the file, and nothing else is."""
    from nxm_export.graph.reading.graph_weights import load_graph, save_graph

    model = load_graph(tiny_graph("bert", "inputs") / "model.onnx")
    name = "bert.encoder.layer.1.output.dense"
    nodes = {node.name: node for node in model.graph}
    nodes[name].replace_input_with(0, nodes[f"{name}.input_quantize"].inputs[0])
    save_graph(model, tmp_path / "model.onnx")
    passport = build_engine(tmp_path / "model.onnx", tmp_path / "engine", "openvino", BuildOptions(threads=1))
    assert passport.options["float_products"] == [f"{name}.weight"]
    assert passport.options["integer_products"] == 11


def test_a_weight_runs_on_integers_where_all_of_its_products_do() -> None:
    def split(*models: dict[str, str]) -> tuple[list[str], list[str]]:
        made = [[openvino_backend.MatrixProduct(name, kind, "") for name, kind in model.items()] for model in models]
        return openvino_backend._split(["layer.1.weight", "layer.10.weight"], made)

    integers = {"layer.1/matmul": "i8", "layer.1.use2": "u8", "layer.10": "i8"}
    assert split(integers) == (["layer.1.weight", "layer.10.weight"], [])
    assert split({**integers, "layer.1.use2": "f32"}) == (["layer.10.weight"], ["layer.1.weight"])
    assert split({**integers, "layer.1/other": "f32"}) == (["layer.10.weight"], ["layer.1.weight"])
    assert split(integers, {"layer.10": "i8"}) == (["layer.10.weight"], ["layer.1.weight"])


@pytest.mark.parametrize("placement", ["inputs", "inputs-outputs"])
def test_it_agrees_with_onnx_runtime_and_with_pytorch(
    placement: str, tiny_engine: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    feeds = baked.feeds("bert", 8, 12, padding=4)
    directory = tiny_engine("openvino", "bert", placement)
    plan = open_part(tiny_checkpoint("bert"), directory).plan
    with (
        backend("openvino").load(directory) as ours,
        backend("ort").load(tiny_engine("ort", "bert", placement)) as other,
        pytorch.load(tiny_checkpoint("bert"), task="classification", plan=plan, exact=True) as reference,
    ):
        actual = ours.run(feeds)["logits"]
        # A code that moves by one step changes these logits by some 0.05; in bfloat16 nearly all would.
        np.testing.assert_allclose(actual, other.run(feeds)["logits"], atol=0.1)
        np.testing.assert_allclose(actual, reference.run(feeds)["logits"], atol=0.1)


@pytest.mark.parametrize(
    ("family", "placement"),
    variants(
        [
            (name, placement)
            for name, family in FAMILIES.items()
            for placement in INT8_ATTENTION
            if placement in placements_of(family)
        ],
        lambda pair: pair[0] == "bert",
        slow=tuple(itertools.product(tiny.DISTINCT, INT8_ATTENTION)),
    ),
)
def test_int8_attention_agrees_with_pytorch(family: str, placement: str, tmp_path: Path) -> None:
    from nxm_export.graph.exporter import export

    checkpoint = baked.write_checkpoint(family, tmp_path / "checkpoint", attention="int8", placement="attention")
    graph = export(checkpoint, tmp_path / "graph", placement=placement).path
    build_engine(graph, tmp_path / "engine", "openvino")
    plan = open_part(checkpoint, tmp_path / "engine").plan
    assert plan is not None
    assert placement_of(plan) == placement
    feeds = baked.feeds(family, 8, 12, padding=4)
    with (
        backend("openvino").load(tmp_path / "engine") as ours,
        pytorch.load(checkpoint, task="classification", plan=plan, exact=True) as reference,
    ):
        # A code that moves by one step changes these logits by some 0.05.
        np.testing.assert_allclose(ours.run(feeds)["logits"], reference.run(feeds)["logits"], atol=0.1)


def test_float_layers_run_in_float32(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """OpenVINO's own choice on a CPU with bfloat16 errs by some 1e-2 of a value; float32 sums by under 1e-5."""
    from nxm_export.graph.exporter import export

    graph = export(tiny_checkpoint("bert"), tmp_path / "graph", placement="float").path
    for name in ("openvino", "ort"):
        build_engine(graph, tmp_path / name, name)
    feeds = baked.feeds("bert", 4, 9)
    with backend("openvino").load(tmp_path / "openvino") as one, backend("ort").load(tmp_path / "ort") as two:
        np.testing.assert_allclose(one.run(feeds)["logits"], two.run(feeds)["logits"], rtol=1e-4, atol=1e-5)


def test_its_quantizer_errs_no_further_from_a_tie_than_the_tolerance_says(tmp_path: Path) -> None:
    """It rounds x * (1/s) + 128 in float32: within 2**-17 of a code of a tie, and two roundings of x and 1/s more, it
    may choose the other code; further away it never does. That is where `QUANTIZER_ROUNDING` comes from."""
    import openvino

    from engines.openvino.backend import settings

    core, scale = openvino.Core(), np.float64(np.float32(0.0371))
    file = onnx_text.save(CODES, tmp_path / "codes.onnx", opset=20)
    compiled = core.compile_model(core.read_model(file), "CPU", settings(1))
    codes = np.random.default_rng(0).integers(-100, 100, (5000, 4)).astype(np.float64)
    window = 2.0**-17 + 2 * 101 * 2.0**-24

    def wrong(distance: float) -> float:
        """Share of wrong codes for values this far, in codes, above a tie."""
        x = ((codes + 0.5 + distance) * scale).astype(np.float32)
        exact = np.rint(x.astype(np.float64) / scale)
        return float((np.rint(compiled({"x": x})[0] / np.float32(0.0371)) != exact).mean())

    assert wrong(4 * window) == 0.0
    assert wrong(2.0**-19) > 0.01, "it rounds as exactly as a division does: drop QUANTIZER_ROUNDING"


def test_only_its_quantized_engines_are_given_that_tolerance(
    tiny_engine: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = tiny_checkpoint("bert")
    assert open_part(checkpoint, tiny_engine("openvino")).rounding == QUANTIZER_ROUNDING["openvino"]
    assert open_part(checkpoint, tiny_engine("ort")).rounding == 0.0


def test_its_blocks_can_be_compared(
    tiny_engine: Callable[..., Path], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("bert")
    engine = shutil.copytree(tiny_engine("openvino"), tmp_path / "engine")  # the report is written beside it
    features = features_of(engine, str(checkpoint.parent / "dev.tsv"), Columns())
    report = bisect(checkpoint, engine, features, graph=engine / "model.onnx")
    report.require()
    assert [block.passed for block in report.blocks] == [True] * 4


def test_threads_are_recorded_and_used(tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
    passport = build_engine(tiny_graph() / "model.onnx", tmp_path / "engine", "openvino", BuildOptions(threads=1))
    assert passport.threads == 1
    for options, threads, streams in (
        (LoadOptions(), 1, 1),
        (LoadOptions(2), 2, 1),
        (LoadOptions(2, "throughput"), 2, 2),
    ):
        with openvino_backend.load(tmp_path / "engine", options) as engine:
            requests = engine._requests
            assert requests is not None
            with requests.free() as request:
                compiled = cast(Any, request).get_compiled_model()
                assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
                assert compiled.get_property("NUM_STREAMS") == streams == engine.runs_at_once


def test_inspection_is_json(tiny_engine: Callable[..., Path]) -> None:
    json.dumps(openvino_backend.inspect(tiny_engine("openvino")).to_dict())
