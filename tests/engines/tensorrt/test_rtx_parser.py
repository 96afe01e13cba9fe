"""The parser of the installed TensorRT-RTX is asked in a process of its own, and believed in what it refuses alone."""

import importlib.util
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from engines.tensorrt import rtx_parser
from engines.tensorrt.rtx_parser import ask_parser
from nxm_export.cli import main
from nxm_export.errors import EngineUnavailable
from nxm_export.pipeline.file_diagnosis import diagnose_file
from tests.support.qdq_graphs import QdqProduct

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'",
)


@needs_rtx
def test_errors_name_their_nodes_and_warnings_are_kept(tmp_path: Path) -> None:
    answer = ask_parser(QdqProduct(bias="int32").save(tmp_path / "bias.onnx"))
    assert not answer.accepted
    assert answer.errors[0].startswith("bias_dq: ")
    assert "Int32" in answer.errors[0]
    assert answer.parser.startswith("TensorRT-RTX 1.")
    warned = ask_parser(QdqProduct(input_type="UINT8").save(tmp_path / "uint8.onnx"))
    assert warned.accepted
    assert any("UINT8" in warning for warning in warned.warnings)


@needs_rtx
def test_what_it_takes_is_not_ready_for_that_and_what_it_refuses_is_a_problem(tmp_path: Path) -> None:
    taken = diagnose_file(QdqProduct(dense=True).save(tmp_path / "dense.onnx"), "trt", "8.6", "8.0", parse=True)
    assert taken.parsed is not None
    assert taken.parsed.accepted
    assert not taken.problems
    assert not any(weight.ready for weight in taken.sparsity.weights)
    model = QdqProduct().model()
    model.graph.node[-1].attribute.append(onnx.helper.make_attribute("axis", 7))  # no rule of ours looks at that
    model.graph.initializer[-2].CopyFrom(onnx.helper.make_tensor("o_scale", 1, [1], [0.05]))
    onnx.save(model, tmp_path / "odd.onnx")
    refused = diagnose_file(tmp_path / "odd.onnx", "trt", "8.6", "8.0", parse=True)
    assert refused.parsed is not None
    if not refused.parsed.accepted:
        assert any("parser refuses it" in problem for problem in refused.problems)
        assert not any(weight.ready for weight in refused.sparsity.weights)


@needs_rtx
def test_the_command_line_prints_its_verdict_and_gives_it_as_json(tmp_path: Path) -> None:
    file = str(QdqProduct(bias="int32").save(tmp_path / "bias.onnx"))
    shown = CliRunner().invoke(main, ["doctor", file, "--parse", "--gpu", "A100", "--version", "8.6"]).output
    assert "'s parser refuses it" in shown
    assert "problem: bias_dq: dequantizes INT32" in shown
    printed = CliRunner().invoke(main, ["doctor", file, "--parse", "--json"]).stdout
    assert '"accepted": false' in printed


def test_a_parser_that_crashes_or_says_nothing_has_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_parser, "find_spec", lambda name: object())
    monkeypatch.setattr(rtx_parser, "version", lambda name: "1.7.1")
    file = QdqProduct().save(tmp_path / "model.onnx")
    for code in ("import os; os.abort()", "pass", "import sys; sys.exit(3)"):
        monkeypatch.setattr(rtx_parser, "module_command", lambda *_, code=code: [sys.executable, "-c", code])
        answer = ask_parser(file)
        assert not answer.accepted
        assert "said nothing" in answer.errors[0]


def test_without_tensorrt_rtx_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_parser, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'nxm-export\[trt-rtx\]', or leave --parse out"):
        ask_parser(tmp_path / "model.onnx")
