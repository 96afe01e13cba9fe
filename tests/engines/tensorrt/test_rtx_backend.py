"""TensorRT-RTX builds every preset, family and lowering, without a GPU, and keeps every planned product on integers."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

from engines.base import BuildOptions, Profile
from engines.sparsity.build_evidence import LayerInfo, parse_layers
from nxm_export.cli import main
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import INT8_ATTENTION, PLACEMENTS
from nxm_export.errors import ArtifactError, EngineError, ExportError, ParityError
from nxm_export.graph.exporter import export
from nxm_export.graph.external_data import has_external_data
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.pipeline.engine_comparison import _export_again
from tests.support import baked, tiny
from tests.support.trt_models import Checkpoints

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")
pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'nxm-export[trt-rtx]'")

from engines.tensorrt import rtx_backend
from tests.support.variants import placements_of, variants

PROFILES = {"batch 1": Profile((1, 16), (1, 16), (1, 16)), "dynamic": Profile((1, 1), (4, 32), (8, 64))}


def layers_of(directory: Path) -> list[LayerInfo]:
    return parse_layers((directory / "build.log").read_text(encoding="utf-8", errors="replace").splitlines())


CASES = [
    case
    for case in itertools.product(FAMILIES, PLACEMENTS, ("matmul", "gemm"), PROFILES)
    if case[1] in placements_of(FAMILIES[case[0]])
    if case[0] in tiny.SHORT[:-1] or case[2:] == ("matmul", "dynamic")  # the others have blocks of the same forms
    if case[1] != "products" or case == ("bert", "products", "matmul", "dynamic")  # `attention` with fewer quantizers
]
# All of BERT's; of the others every family with every placement, lowering and shape.
PAIRWISE = tuple(
    case for case in CASES if case[0] == "bert" or case[2:] in (("matmul", "dynamic"), ("gemm", "batch 1"))
)


@pytest.mark.parametrize(
    ("family", "placement", "lowering", "shape"),
    variants(CASES, lambda case: (case[0], *case[2:]) == ("bert", "matmul", "dynamic"), slow=PAIRWISE),
)
def test_every_planned_product_runs_on_integers_and_attention_is_fused_as_planned(
    checkpoints: Checkpoints, tmp_path: Path, family: str, placement: str, lowering: str, shape: str
) -> None:
    graph = export(checkpoints(family, placement), tmp_path / "graph", target="trt", lowering=lowering)
    passport = rtx_backend.build(graph.path, tmp_path, BuildOptions(profiles=[PROFILES[shape]]))
    kind = FAMILIES[family]
    in_integers = [linear for linear in kind.linears if placement != "ffn-only" or linear.reads in ("ffn", "wide")]
    planned = sum(len(linear.parts) or 1 for linear in in_integers)
    assert passport.options["planned_products"] == passport.options["integer_products"] == planned
    assert passport.options["float_products"] == ()
    integer = [layer for layer in layers_of(tmp_path) if layer.is_integer_product and "mha" not in layer.kernel]
    # As docs/tensorrt.md has it, without a GPU; Int8 where quantizers stand behind would be so much better.
    assert {layer.outputs for layer in integer} == {("Half",)}
    fused = [layer for layer in layers_of(tmp_path) if "mha" in layer.kernel or "mha" in layer.name]
    expected = {"inputs": "Half", "ffn-only": "Half", "products": "Int8", "attention": "Int8"}.get(placement)
    if placement == "inputs-outputs" and not kind.operands_are_outputs:
        expected = "Half"  # query and key are quantized before their rotation, not as they are multiplied
    if expected is None:  # quantized q, k, v around a float softmax: TensorRT has no fused kernel for that
        assert not fused
    else:
        assert len(fused) == 1
        assert expected in fused[0].inputs
        assert ("Int8" in fused[0].inputs) == (placement in INT8_ATTENTION)


def test_int4_weights_are_built_and_multiplied_as_integers_and_a_pattern_stays_int8(tmp_path: Path) -> None:
    """Half of the matrices have a pattern. What RTX makes of INT4: a layer that casts, then an INT8 product."""
    specs = {"*attention.self*": "W4", "*attention.output*": "W3", "*intermediate*": "2:4+W4", "*output*": "2:4+W8"}
    checkpoint = baked.write_checkpoint("bert", tmp_path / "checkpoint", specs=specs)
    graph = export(checkpoint, tmp_path / "graph", target="trt", weights_stored="int4")
    engine = tmp_path / "engine"
    engine.mkdir()
    passport = rtx_backend.build(graph.path, engine, BuildOptions(profiles=[Profile((1, 1), (4, 32), (8, 48))]))
    assert passport.options["integer_products"] == passport.options["planned_products"] == 6
    layers = layers_of(engine)
    assert sum("Int4" in layer.constants for layer in layers) == 4
    products = {node: layer for layer in layers if layer.is_integer_product for node in layer.onnx}
    for weight in rtx_backend.inspect(engine).sparsity.weights:
        if weight.planned not in (None, "dense"):
            layer, sparse = products[weight.node], weight.planned_sparse
            assert weight.type == ("int8" if sparse else "int4")
            assert ("Int8" in layer.constants, layer.inputs) == (sparse, ("Int8",) if sparse else ("Int8", "Int8"))
    assert _export_again(checkpoint, engine, tmp_path / "again").read_bytes() == graph.path.read_bytes()


def test_the_report_says_that_no_gpu_chose_kernels_and_the_gate_fails_closed(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    from nxm_export.pipeline.engine_sparsity import require_sparse
    from nxm_export.pipeline.inspection import inspect_engine

    graph = export(checkpoints("bert", "inputs-outputs"), tmp_path / "graph", target="trt")
    rtx_backend.build(graph.path, tmp_path)
    sparsity = inspect_engine(tmp_path).sparsity
    assert sparsity is not None
    planned = [weight for weight in sparsity.weights if weight.planned_sparse]
    assert {(weight.chosen, weight.pattern_int8) for weight in planned} == {(None, "2:4")}
    reasons = {weight.name: weight.reason for weight in planned}
    (behind_erf,) = (name for name in reasons if "intermediate" in name)  # BERT's GELU is by erf
    assert reasons.pop(behind_erf) == "activation"
    assert set(reasons.values()) == {"no-gpu"}
    assert sparsity.sparse_share == 0
    with pytest.raises(ParityError, match="5 x no-gpu"):
        require_sparse(tmp_path, 0.01)
    (tmp_path / "weights.json").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.json is missing"):
        inspect_engine(tmp_path)


def test_convolutions_that_the_builder_put_into_float_are_refused_with_the_reason(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    graph = export(checkpoints("bert", "inputs-outputs"), tmp_path / "graph", target="trt", lowering="conv1x1")
    model = load_graph(graph.path)
    built_in_float = ["bert.encoder.layer.0.attention.self.key", "some.matmul"]
    with pytest.raises(
        EngineError, match=r"runs 1 INT8 convolutions in float, such as bert\.encoder.*--lowering matmul"
    ):
        rtx_backend._require_integer_convolutions(model, built_in_float, graph.path)
    rtx_backend._require_integer_convolutions(model, ["some.matmul"], graph.path)


def test_our_own_convolutions_keep_rows_and_run_on_integers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """With one token per image no data moves, and TensorRT-RTX 1.7.1 multiplies integers."""
    graph = export(checkpoints("bert", "inputs-outputs"), tmp_path / "graph", target="trt", lowering="conv1x1")
    passport = rtx_backend.build(graph.path, tmp_path, BuildOptions(profiles=[PROFILES["dynamic"]]))
    assert passport.options["integer_products"] == 6
    products = [layer for layer in layers_of(tmp_path) if layer.kind == "correlation"]
    assert {layer.inputs for layer in products} == {("Int8",)}
    assert all("Int8" in layer.constants for layer in products), "the weights, too"


def _constants(shape: tuple[int, ...], zero: int = 0, scales: int = 64) -> dict[str, np.ndarray]:
    return {
        "s": np.array(0.02, np.float16), "z": np.array(zero, np.int8),
        "w": np.random.default_rng(0).integers(-127, 128, size=shape).astype(np.int8),
        "ws": np.full(scales, 0.01, np.float16), "wz": np.zeros(scales, np.int8),
    }  # fmt: skip


def _linear(tmp_path: Path, *, zero: int = 0, axis: int = 1) -> Path:
    """x -> Q/DQ -> MatMul(DQ(INT8 weight)) as ONNX text, with one number to break."""
    text = f"""
      <ir_version: 10, opset_import: ["" : 21]>
      agraph (float16[4, 64] x) => (float16[4, 64] y) {{
        q = QuantizeLinear(x, s, z)
        dq = DequantizeLinear(q, s, z)
        wd = DequantizeLinear<axis = {axis}>(w, ws, wz)
        product = MatMul(dq, wd)
        y = Identity(product)
      }}"""
    model = onnx.parser.parse_model(text)
    model.graph.node[3].name = "the_product"
    constants = _constants((64, 64), zero)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    return file


def test_our_own_check_catches_what_tensorrt_would_refuse_or_silently_run_in_float(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="zero point 3 is not 0, and TensorRT refuses asymmetric activations"):
        rtx_backend.build(_linear(tmp_path, zero=3), tmp_path)
    with pytest.raises(ExportError, match="its scales lie along K"):
        rtx_backend.build(_linear(tmp_path, axis=0), tmp_path)


def test_behind_our_check_tensorrt_says_what_we_say_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nxm_export.contract.records.verify_report import VerifyReport

    monkeypatch.setattr(VerifyReport, "require", lambda self: None)
    with pytest.raises(
        EngineError, match=r"cannot parse it: layer .*QuantizeLinear.*Non-zero zero point is not supported"
    ):
        rtx_backend.build(_linear(tmp_path, zero=3), tmp_path)
    passport = rtx_backend.build(_linear(tmp_path, axis=0), tmp_path)
    assert passport.options["integer_products"] == 0, "scales along K: built, and silently in float"
    passport = rtx_backend.build(_linear(tmp_path), tmp_path)
    assert passport.options["integer_products"] == 1


def test_a_graph_that_tensorrt_cannot_parse_keeps_its_message_and_names_the_layer(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "example" : 1]>'
        "agraph (float[2, 4] x) => (float[2, 4] y) { y = example.Mystery(x) }"
    )
    model.graph.node[0].name = "encoder.layer.7.mystery"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=r"layer encoder\.layer\.7\.mystery \(Mystery\): .+"):
        rtx_backend.build(tmp_path / "model.onnx", tmp_path)


def test_profiles_outside_the_models_positions_and_build_routes_are_refused(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    graph = export(checkpoints("bert", "inputs"), tmp_path / "graph", target="trt")
    with pytest.raises(EngineError, match="a profile goes to 65 tokens, and the model takes at most 64"):
        rtx_backend.build(graph.path, tmp_path, BuildOptions(profiles=[Profile((1, 1), (1, 65), (1, 65))]))
    with pytest.raises(EngineError, match="has no build routes"):
        rtx_backend.build(graph.path, tmp_path, BuildOptions(build_route="-cask:sparsity=must"))


def test_progress_comes_from_the_builder(checkpoints: Checkpoints, tmp_path: Path) -> None:
    graph = export(checkpoints("bert", "inputs"), tmp_path / "graph", target="trt")
    reports: list[tuple[str, int, int]] = []
    rtx_backend.build(graph.path, tmp_path, BuildOptions(progress=lambda *report: reports.append(report)))
    assert reports
    assert all(0 <= done <= total for _, done, total in reports)
    for phase in {phase for phase, _, _ in reports}:
        _, done, total = [report for report in reports if report[0] == phase][-1]
        assert done == total, "every phase ends"


def _rows(file: Path, inputs: str, text: str) -> Path:
    """A graph of `inputs` in ONNX text that reads a table of 256 positions of 8 features, and a weight of 8 x 8."""
    graph = f"""<ir_version: 9, opset_import: ["" : 17]> g ({inputs}) => (float[] y) {{ {text} }}"""
    model = onnx.parser.parse_model(graph.replace("float[] y", "float y"))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    random = np.random.default_rng(0)
    for name, shape in (("positions", (256, 8)), ("w", (8, 8))):
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, file)
    return file


def test_a_profile_beyond_the_table_of_positions_is_named_and_the_log_is_kept(tmp_path: Path) -> None:
    from nxm_export.pipeline.engine_builds import build_engine

    file = _rows(tmp_path / "model.onnx", "float[b, s, 8] x", "h = Add(x, positions) y = MatMul(h, w)")
    with pytest.raises(EngineError, match=r"256 != 128") as failure:
        build_engine(file, tmp_path / "engine", "trt_rtx")
    message = str(failure.value)
    assert "does not take every shape of the profile (1x1 to 32x512, best 8x128" in message
    assert "PolygraphyException" not in message
    assert message.endswith(f"(log: {tmp_path / 'engine.build.log'})")
    assert "256 != 128" in (tmp_path / "engine.build.log").read_text()
    assert not (tmp_path / "engine").exists()
    profile = Profile((1, 256), (8, 256), (8, 256))
    assert build_engine(file, tmp_path / "engine", "trt_rtx", BuildOptions(profiles=[profile])).profiles == (profile,)


@pytest.mark.parametrize(
    ("inputs", "text", "profile"),
    [
        ("float[b, 8] x", "y = MatMul(x, w)", Profile((1, 8), (8, 8), (32, 8))),
        ("float[b, s, 8] x", "y = MatMul(x, w)", Profile((1, 1), (8, 128), (32, 512))),
        ("float[1, 6, 8] x", "y = MatMul(x, w)", Profile((1, 6), (1, 6), (1, 6))),
        ("int32[b, 4] x", "h = Gather(positions, x) y = MatMul(h, w)", Profile((1, 4), (8, 4), (32, 4))),
    ],
    ids=["rows", "hidden", "fixed", "int32"],
)
def test_sizes_that_the_graph_has_fixed_are_those_of_the_profile(
    inputs: str, text: str, profile: Profile, tmp_path: Path
) -> None:
    passport = rtx_backend.build(_rows(tmp_path / "model.onnx", inputs, text), tmp_path)
    assert passport.profiles == (profile,)


def test_weights_beside_the_graph_are_built_into_the_engine(tmp_path: Path) -> None:
    from nxm_export.pipeline.engine_builds import build_engine

    plain, beside = _rows(tmp_path / "plain.onnx", "float[b, 8] x", "y = MatMul(x, w)"), tmp_path / "beside.onnx"
    onnx.save(onnx.load(plain), beside, save_as_external_data=True, location="beside.onnx.data", size_threshold=0)
    assert has_external_data(load_graph(beside))
    assert build_engine(beside, tmp_path / "engine", "trt_rtx").backend == "trt_rtx"
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "engine")])
    assert inspected.stdout.startswith("An engine of backend trt_rtx, built on no GPU, for compute capability 8.6, ")
    assert not list((tmp_path / "engine").glob("*.data"))


def test_a_profile_without_the_fixed_size_is_refused(tmp_path: Path) -> None:
    file = _rows(tmp_path / "model.onnx", "float[b, 8] x", "y = MatMul(x, w)")
    with pytest.raises(EngineError, match=r"a profile has sequence 1 to 4, and the graph takes 8 alone.*\(\?, 8\)"):
        rtx_backend.build(file, tmp_path, BuildOptions(profiles=[Profile((1, 1), (1, 4), (1, 4))]))
    empty = _rows(tmp_path / "empty.onnx", "float[b, 0] x", "y = MatMul(x, w)")
    with pytest.raises(EngineError, match="has a size of 0"):
        rtx_backend.build(empty, tmp_path)
