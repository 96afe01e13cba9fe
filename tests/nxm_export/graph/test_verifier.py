"""`nxm verify` on graphs written by hand: one good graph, and that graph with one thing wrong, each found by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from nxm_export.contract.plan import CompressionPlan, NMPattern, WeightSpec
from nxm_export.contract.records.verify_report import VerifyReport, read_verify_report
from nxm_export.errors import ArtifactError, ExportError, PlanError
from nxm_export.graph import verifier
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.graph.verifier import verify
from nxm_export.storage.json_files import encode
from tests.support import onnx_text

# (K, N) = (8, 2). Channel 0 keeps inputs 0, 1, 4, 6 and channel 1 keeps 1, 3, 4, 7: 2:4 along K, and no tighter.
WEIGHTS = "{1,0, 3,2, 0,0, 0,-4, 5,9, 0,0, -7,0, 0,8}"
GOOD = f"""
    g (float[batch, 8] x) => (float[batch, 2] y)
    <float sx = {{0.5}}, int8 zx = {{0}}, float sy = {{2.0}}, int8 zy = {{0}},
     int8[8, 2] w_quantized = {WEIGHTS}, float[2] sw = {{0.5, 0.25}}, int8[2] zw = {{0, 0}},
     float[2] b = {{1.0, -1.0}}>
    {{
      [x_q] xq = QuantizeLinear(x, sx, zx)
      [x_dq] xd = DequantizeLinear(xq, sx, zx)
      [w_dq] wd = DequantizeLinear <axis = 1>(w_quantized, sw, zw)
      [product] m = MatMul(xd, wd)
      z = Add(m, b)
      [y_q] zq = QuantizeLinear(z, sy, zy)
      [y_dq] y = DequantizeLinear(zq, sy, zy)
    }}
"""
SPEC = WeightSpec(NMPattern(2, 4), 8, 8, 8)


def plan(spec: WeightSpec = SPEC, name: str = "w") -> CompressionPlan:
    return CompressionPlan("bert", {name: spec}, {name: (2, 8)})


def check(
    tmp_path: Path, text: str = GOOD, *, pattern: str | None = "2:4", planned: CompressionPlan | None = None
) -> VerifyReport:
    file = onnx_text.save(text, tmp_path / "model.onnx")
    return verify(file, plan=planned, pattern=NMPattern.parse(pattern) if pattern else None)


def test_a_good_graph_has_no_problem(tmp_path: Path) -> None:
    report = check(tmp_path, planned=plan())
    assert report.passed
    report.require()
    (weight,) = report.weights
    assert (weight.name, weight.op, weight.k, weight.n, weight.stored) == ("w", "MatMul", 8, 2, "INT8")
    assert (weight.scale_axis, weight.zeros, weight.pattern, weight.planned) == ("N", 0.5, "2:4", "2:4+W8")
    assert (report.quantize_nodes, report.dequantize_nodes) == (2, 3)
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # one number in the weight: a third value in the second group of channel 1, which is inputs 4 to 7
        ("5,9, 0,0, -7,0, 0,8", "5,9, 0,1, -7,0, 0,8", "w: not 2:4 along K: 1 of 4 groups keep more than 2"),
        # 2:4 along N is not 2:4: rows 0 and 1 full, so channel 0 keeps inputs 0, 1, 2
        ("{1,0, 3,2, 0,0, 0,-4", "{1,2, 3,4, 5,0, 0,0", "w: not 2:4 along K: 1 of 4 groups keep more than 2"),
        ("float[2] sw = {0.5, 0.25}", "float[8] sw = {1,1,1,1,1,1,1,1}", "w: 8 scales for 2 output channels"),
        ("sw = {0.5, 0.25}", "sw = {0.5, 0.0}", "w: a scale is not a positive number"),
        ("sw = {0.5, 0.25}", "sw = {0.5, -0.25}", "w: a scale is not a positive number"),
        ("sw = {0.5, 0.25}", "sw = {0.5, 1e-40}", "w: a scale of 1e-40 is subnormal in float32"),
        ("zw = {0, 0}", "zw = {0, 1}", "w: its zero point is not 0, and TensorRT refuses asymmetric weights"),
        ("int8 zx = {0}", "int8 zx = {3}", "x_q: zero point 3 is not 0, and TensorRT refuses asymmetric activations"),
        ("float sx = {0.5}", "float sx = {0.0}", "x_q: its scale is not a positive number"),
        ("float sx = {0.5}", "float sx = {1e-40}", "x_q: its scale of 1e-40 is subnormal in float32"),
        (
            "DequantizeLinear(xq, sx, zx)",
            "DequantizeLinear(xq, sy, zx)",
            "x_q: quantizes with another scale than x_dq dequantizes with",
        ),
        (
            "float sx = {0.5}, int8 zx = {0}",
            "float[8] sx = {1,1,1,1,1,1,1,1}, int8[8] zx = {0,0,0,0,0,0,0,0}",
            "x_q: 8 scales on an activation; only one per tensor",
        ),
        (
            "[y_dq] y = DequantizeLinear(zq, sy, zy)",
            "y = Cast <to = 1>(zq)",
            "y_q: quantizes into Cast; an orphan without DequantizeLinear",
        ),
        (
            "[y_dq] y = DequantizeLinear(zq, sy, zy)",
            "y = Identity(z)",
            "y_q: quantizes into nothing; an orphan without DequantizeLinear",
        ),
        (
            "[x_q] xq = QuantizeLinear(x, sx, zx)",
            "c = Clip(x) xq = Cast <to = 3>(c)",
            "x_dq: dequantizes what nothing quantized",
        ),
        (
            "[x_q] xq = QuantizeLinear(x, sx, zx)",
            "s = ReduceMax <keepdims = 0>(x) [x_q] xq = QuantizeLinear(x, s, zx)",
            "x_q: its scale is not a constant: dynamic quantization, which TensorRT does not take",
        ),
        (
            "[x_q] xq = QuantizeLinear(x, sx, zx)",
            "[dyn] u, us, uz = DynamicQuantizeLinear(x) [x_q] xq = QuantizeLinear(x, sx, zx)",
            "dyn: dynamic quantization, which TensorRT does not take",
        ),
        (
            "[x_q] xq = QuantizeLinear(x, sx, zx)",
            "[x_q] xq = QuantizeLinear(x, sx, zx) [twin] tq = QuantizeLinear(x, sx, zx) t = DequantizeLinear(tq, sx, "
            "zx)",
            "x_q, twin: 2 QuantizeLinear nodes on one tensor",
        ),
        (
            "MatMul(xd, wd)",
            "com.microsoft.MatMulNBits <K = 8, N = 2, bits = 4, block_size = 16>(xd, b, sw)",
            "1 MatMulNBits nodes: its weights are packed and cannot be checked",
        ),
    ],
)
def test_one_thing_wrong_is_found_and_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    report = check(tmp_path, GOOD.replace(old, new))
    assert any(message in problem for problem in report.all_problems), report.all_problems
    assert not report.passed
    with pytest.raises(ExportError, match=r"model\.onnx"):
        report.require()


@pytest.mark.parametrize("kept", [255, 256, 257, 512])
def test_wide_groups_are_counted_in_full(tmp_path: Path, kept: int) -> None:
    """A count of 256 kept weights is none in 8 bits."""
    values = ",".join("1" if i < kept else "0" for i in range(512))
    text = f"""
        g (float[batch, 512] x) => (float[batch, 1] y)
        <int8[512, 1] w = {{{values}}}, float[1] s = {{0.5}}>
        {{ wd = DequantizeLinear <axis = 1>(w, s)  y = MatMul(x, wd) }}
    """
    assert not check(tmp_path, text, pattern="254:512").passed
    assert check(tmp_path, text, pattern="1:512").all_problems == [
        "w: not 1:512 along K: 1 of 1 groups keep more than 1"
    ]
    assert check(tmp_path, text, pattern=f"{min(kept, 511)}:512").passed == (kept < 512)


def test_scales_along_k_are_found_where_k_and_n_are_equal(tmp_path: Path) -> None:
    """The shapes fit either way there, and TensorRT would run the product in float without a word."""
    text = """
        g (float[batch, 4] x) => (float[batch, 4] y)
        <int8[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float[4] s = {1,2,3,4}, int8[4] z = {0,0,0,0}>
        { wd = DequantizeLinear <axis = AXIS>(w, s, z)  y = MatMul(x, wd) }
    """
    assert check(tmp_path, text.replace("AXIS", "1"), pattern="1:4").passed
    report = check(tmp_path, text.replace("AXIS", "0"), pattern="1:4")
    assert "its scales lie along K, the reduced axis" in report.all_problems[0]


def test_a_subnormal_half_precision_scale_is_found(tmp_path: Path) -> None:
    text = """
        g (float16[batch, 2] x) => (float16[batch, 2] y)
        <int8[2, 2] w = {1,0,0,1}, int8[2] z = {0,0}>
        { s32 = Constant <value = float[2] {SCALES}>() s = Cast <to = 10>(s32)
          wd = DequantizeLinear <axis = 1>(w, s, z)  y = MatMul(x, wd) }
    """
    import onnx_ir as ir

    for scale, message in ((6.2e-5, None), (3e-5, "a scale of 3e-05 is subnormal in float16 (below 6.1e-05)")):
        model = onnx_text.model(text.replace("SCALES", f"1.0, {scale}"))
        cast = next(node for node in model.graph if node.op_type == "Cast")
        value = ir.Value(name="s16", const_value=ir.tensor(np.array([1.0, scale], np.float16), name="s16"))
        model.graph.register_initializer(value)
        for user in list(cast.outputs[0].consumers()):
            user.replace_input_with(1, value)
        report = verify(onnx_text.save(model, tmp_path / "half.onnx"))
        assert (report.all_problems == []) if message is None else (message in report.all_problems[0])


def test_blocked_scales_are_no_integer_kernel(tmp_path: Path) -> None:
    text = """
        g (float[batch, 4] x) => (float[batch, 2] y)
        <int8[4, 2] w = {1,0, 0,1, 1,0, 0,1}, float[2, 2] s = {1,1, 1,1}, int8[2, 2] z = {0,0, 0,0}>
        { wd = DequantizeLinear <axis = 0, block_size = 2>(w, s, z)  y = MatMul(x, wd) }
    """
    assert check(tmp_path, text, pattern=None).all_problems == [
        "w: it has several scales along K (blocks): no integer kernel can apply them"
    ]


class TestAgainstAPlan:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (
                "MatMul(xd, wd)",
                "MatMul(x, wd)",
                "w: its input is planned INT8, and no QuantizeLinear and DequantizeLinear stand before it",
            ),
            (
                "z = Add(m, b)",
                "z0 = Add(m, b) z = Relu(z0)",
                "w: its output is planned INT8, and no QuantizeLinear stands behind it",
            ),
            (
                "[y_q] zq = QuantizeLinear(z, sy, zy)\n      [y_dq] y = DequantizeLinear(zq, sy, zy)",
                "y = Identity(z)",
                "w: its output is planned INT8",
            ),
            ("w_quantized", "other_quantized", "w is planned and not in the graph under its name"),
            ("int8 zx = {0}", "uint8 zx = {0}", "w: its input is planned INT8, and x_q quantizes it to UINT8"),
            ("int8 zx = {0}", "int16 zx = {0}", "w: its input is planned INT8, and x_q quantizes it to INT16"),
            ("int8 zy = {0}", "uint8 zy = {0}", "w: its output is planned INT8, and y_q quantizes it to UINT8"),
            (
                "zq = QuantizeLinear(z, sy, zy)\n      [y_dq] y = DequantizeLinear(zq, sy, zy)",
                "zq = QuantizeLinear(z, sy)\n      [y_dq] y = DequantizeLinear(zq, sy)",
                "w: its output is planned INT8, and y_q quantizes it to UINT8",
            ),
            (
                "x, sx, zx)\n      [x_dq] xd = DequantizeLinear(xq, sx, zx)",
                "x, sx)\n      [x_dq] xd = DequantizeLinear(xq, sx)",
                "w: its input is planned INT8, and x_q quantizes it to UINT8",
            ),
        ],
    )
    def test_a_missing_quantizer_or_weight_is_found(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        assert old in GOOD
        report = check(tmp_path, GOOD.replace(old, new), pattern=None, planned=plan())
        assert any(message in problem for problem in report.all_problems), report.all_problems

    def test_a_matrix_of_another_shape_is_found(self, tmp_path: Path) -> None:
        other = CompressionPlan("bert", {"w": SPEC}, {"w": (8, 8)})
        assert check(tmp_path, planned=other).all_problems == ["w: planned 8 x 8 (out, in), and is 2 x 8"]

    def test_the_quantizers_of_a_weight_on_the_left_are_none_of_its_input(self, tmp_path: Path) -> None:
        text = """
            g (float[4, n] x) => (float[1, n] y)
            <float[1, 4] w_dense = {1,0,3,0}, float[1] sw = {1.0}, int8[1] zw = {0}>
            { wq = QuantizeLinear <axis = 0>(w_dense, sw, zw) wd = DequantizeLinear <axis = 0>(wq, sw, zw)
              y = MatMul(wd, x) }
        """
        planned = CompressionPlan("bert", {"w": WeightSpec(None, 8, 8)}, {"w": (1, 4)})
        (problem,) = check(tmp_path, text, pattern=None, planned=planned).all_problems
        assert problem.startswith("w: its input is planned INT8, and no QuantizeLinear")

    def test_a_code_beyond_the_planned_bits_is_found(self, tmp_path: Path) -> None:
        four = WeightSpec(NMPattern(2, 4), 4, 8, 8)
        assert check(tmp_path, planned=plan(four)).all_problems == ["w: a code exceeds 7, the planned 4 bits"]

    @pytest.mark.parametrize(("bits", "largest"), [(8, 9), (5, 15), (4, 7), (3, 3), (2, 1)])
    def test_the_largest_code_of_the_planned_bits_is_none_too_many(
        self, tmp_path: Path, bits: int, largest: int
    ) -> None:
        for code in (largest, -largest):
            text = GOOD.replace(WEIGHTS, f"{{{code},0, 1,1, 0,0, 0,-1, 1,1, 0,0, -1,0, 0,1}}")
            assert check(tmp_path, text, planned=plan(WeightSpec(NMPattern(2, 4), bits, 8, 8))).passed

    @pytest.mark.parametrize(("stored", "code"), [("int32", 65537), ("int32", -65536), ("int16", -32768)])
    def test_a_code_beyond_16_bits_is_found(self, tmp_path: Path, stored: str, code: int) -> None:
        text = GOOD.replace("int8[8, 2] w_quantized", f"{stored}[8, 2] w_quantized").replace("{1,0,", f"{{{code},0,")
        text = text.replace("int8[2] zw", f"{stored}[2] zw")
        assert check(tmp_path, text, planned=plan()).all_problems == ["w: a code exceeds 127, the planned 8 bits"]

    def test_a_weight_in_float_that_was_planned_in_integers_is_found(self, tmp_path: Path) -> None:
        text = "g (float[b, 4] x) => (float[b, 1] y) <float[4, 1] w = {1,0,0,2}> { y = MatMul(x, w) }"
        problems = check(tmp_path, text, pattern=None, planned=plan(WeightSpec(None, 8, 8))).all_problems
        assert "w: planned W8, and stored as FLOAT" in problems

    def test_a_pattern_that_is_asked_for_is_required_of_planned_weights_too(self, tmp_path: Path) -> None:
        assert check(tmp_path, planned=plan(), pattern="1:2").passed is False
        found = check(tmp_path, planned=plan(), pattern="1:4").all_problems
        assert [text for text in found if text.startswith("w: not 1:4 along K")] == found != []
        dense = check(tmp_path, planned=plan(WeightSpec(None, 8, 8, 8)), pattern="1:4")
        assert dense.all_problems == found
        unplanned = (
            "g (float[b, 8] x) => (float[b, 2] y) <float[8, 2] w = {1,1,0,0,0,0,2,2,1,1,0,0,0,0,2,2}>"
            " { y = MatMul(x, w) }"
        )
        required = check(tmp_path, unplanned, pattern="2:4", planned=plan(WeightSpec(NMPattern(2, 4))))
        assert required.all_problems == ["2:4 is required of quantized weights, and the graph has none"]

    def test_a_pattern_is_asked_of_every_quantized_weight_and_of_no_other(self, tmp_path: Path) -> None:
        wider = plan(WeightSpec(NMPattern(4, 8), 8, 8, 8))
        assert check(tmp_path, planned=wider).passed, "what is 2:4 is 4:8"
        four_of_eight = GOOD.replace(WEIGHTS, "{1,0, 3,2, 5,0, 0,-4, 5,9, 0,0, 0,0, 0,8}")
        assert check(tmp_path, four_of_eight, pattern=None, planned=wider).passed
        assert check(tmp_path, four_of_eight, planned=wider).all_problems == [
            "w: not 2:4 along K, which is asked for: 1 of 4 groups keep more than 2"
        ]
        with_head = GOOD.replace("float[2] b", "float[2, 4] head = {1,2,3,4,5,6,7,8}, float[2] b").replace(
            "y = DequantizeLinear(zq, sy, zy)", "yd = DequantizeLinear(zq, sy, zy) y = MatMul(yd, head)"
        )
        report = check(tmp_path, with_head.replace("float[batch, 2] y", "float[batch, 4] y"))
        assert report.passed
        assert [(weight.name, weight.pattern) for weight in report.weights] == [("w", "2:4"), ("head", None)]

    def test_k_that_m_does_not_divide_is_said(self, tmp_path: Path) -> None:
        declared = "g (float[b, 6] x) => (float[b, 1] y) <int8[6, 1] w = {1,0,0,0,0,0}, float s = {1.0}>"
        text = f"{declared} {{ d = DequantizeLinear(w, s) y = MatMul(x, d) }}"
        assert check(tmp_path, text).all_problems == ["w: not 2:4 along K: K is not a multiple of 4: it is 6"]

    def test_the_plan_inside_the_file_is_used_and_a_spoiled_one_refused(self, tmp_path: Path) -> None:
        model = onnx_text.model(GOOD)
        model.metadata_props["nxm.plan"] = plan(WeightSpec(NMPattern(1, 4), 8, 8, 8)).to_json()
        report = verify(onnx_text.save(model, tmp_path / "model.onnx"))
        assert "not 1:4 along K: 4 of 4 groups keep more than 1" in report.all_problems[0]
        model.metadata_props["nxm.plan"] = "{"
        with pytest.raises(PlanError, match=r"model\.onnx \(metadata\): not valid JSON"):
            verify(onnx_text.save(model, tmp_path / "model.onnx"))


def test_a_required_pattern_is_not_met_by_having_no_quantized_weight(tmp_path: Path) -> None:
    text = "g (float[b, 4] x) => (float[b, 1] y) <float[4, 1] w = {1,0,0,2}> { y = MatMul(x, w) }"
    assert check(tmp_path, text, pattern=None).passed
    report = check(tmp_path, text, pattern="2:4")
    assert report.all_problems == ["2:4 is required of quantized weights, and the graph has none"]


def test_nodes_in_branches_are_checked_too(tmp_path: Path) -> None:
    text = """
        g (float[b, 4] x, bool c) => (float[b, 1] y)
        <int8[4, 1] w = {1,1,1,2}, float s = {1.0}, int8 z = {5}>
        {
          y = If (c) <
            then_branch = a () => (float[b, 1] ya) { d = DequantizeLinear(w, s, z)  ya = MatMul(x, d) },
            else_branch = e () => (float[b, 1] ye) { ye = ReduceSum <keepdims = 1>(x) }
          >
        }
    """
    problems = check(tmp_path, text).all_problems
    assert any("w: not 2:4 along K" in problem for problem in problems)
    assert any("its zero point is not 0" in problem for problem in problems)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not a readable ONNX model"),
        (b"\x00" * 100, "not a readable ONNX model"),
        (b"PK\x03\x04 a zip file", "not a readable ONNX model"),
        ("text", "not a readable ONNX model"),
        ("directory", "a directory, not an ONNX file"),
    ],
)
def test_a_file_that_is_no_onnx_is_named(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    file = tmp_path / "model.onnx"
    if content == "directory":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else b"<html>not here</html>")
    with pytest.raises(ArtifactError, match=message):
        verify(file)


def test_a_truncated_file_is_named_wherever_it_ends(tmp_path: Path) -> None:
    """Protobuf accepts a file that ends between two fields; it must not pass for a smaller model."""
    whole = onnx_text.save(GOOD, tmp_path / "whole.onnx").read_bytes()
    silent = []
    for size in range(0, len(whole) - 1, 7):
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        try:
            report = verify(tmp_path / "cut.onnx", plan=plan())
        except ArtifactError:
            continue
        if report.passed:
            silent.append(size)
    assert silent == []


def test_weights_in_another_file_that_is_missing_are_named(tmp_path: Path) -> None:
    import onnx_ir as ir

    text = "g (float[b, 256] x) => (float[b, 256] y) <float[256, 256] w = {1}> { y = MatMul(x, w) }"
    model = onnx_text.model(text.replace("{1}", "{" + ",".join(["1", "0"] * (128 * 256)) + "}"))
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    assert verify(tmp_path / "model.onnx").passed
    whole = (tmp_path / "model.onnx.data").read_bytes()
    for damage in (whole[:1000], b"", None):
        (tmp_path / "model.onnx.data").unlink() if damage is None else (tmp_path / "model.onnx.data").write_bytes(
            damage
        )
        with pytest.raises(
            ArtifactError, match=r"the file is truncated, or its \.data file is missing|not a readable ONNX"
        ):
            verify(tmp_path / "model.onnx")


def test_a_file_that_is_replaced_while_it_is_read_gets_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report names the file that it is about by its sha256."""

    def replaced(file: Path) -> ir.Model:
        model = load_graph(file)
        onnx_text.save(GOOD.replace("-7,0, 0,8", "-7,1, 1,8"), tmp_path / "model.onnx")
        return model

    monkeypatch.setattr(verifier, "load_graph", replaced)
    with pytest.raises(ArtifactError, match=r"model\.onnx changed while it was read"):
        check(tmp_path)


class TestReport:
    def test_a_report_survives_its_file(self, tmp_path: Path) -> None:
        for text in (GOOD, GOOD.replace("int8[2] zw = {0, 0}", "int8[2] zw = {0, 1}")):
            report = check(tmp_path, text)
            (tmp_path / "verify.json").write_text(encode(report.to_dict()))
            assert read_verify_report(tmp_path / "verify.json") == report

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"passed": False}, r"verify\.json: passed is False, and it lists 0 problems; export again"),
            ({"problems": ["one"]}, r"verify\.json: passed is True, and it lists 1 problems; export again"),
            ({"weights": [{"name": "w"}]}, r"verify\.json: weights\[0\]: Object missing required field `op`"),
            ({"schema": "nxm-verify/2"}, "schema nxm-verify/2 is not the nxm-verify/1"),
            ({"colour": "red"}, "unknown field colour"),
        ],
    )
    def test_a_damaged_file_is_refused(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        (tmp_path / "verify.json").write_text(json.dumps({**check(tmp_path).to_dict(), **change}))
        with pytest.raises(ArtifactError, match=message):
            read_verify_report(tmp_path / "verify.json")
