"""What `nxm inspect` and `nxm doctor` know: facts of graphs, engines and runs, and what this machine can do."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

from nxm_export.cli import main
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.pipeline import environment
from nxm_export.pipeline.engine_sparsity import _kernel_names, measure_layers, require_sparse
from nxm_export.pipeline.import_trial import import_problem
from nxm_export.pipeline.inspection import EngineInspection, GraphFacts, RunInspection, inspect_path
from nxm_export.pipeline.run_engines import run_backends
from nxm_export.storage.json_files import entry_at
from nxm_export.storage.run_dir import RunDir
from tests.support import onnx_text

GRAPH = """
agraph (float[batch, 4] x) => (float[batch, 4] y) {
    a = Relu(x)
    b = Relu(a)
    y = Identity(b)
}
"""


def test_a_graph_has_its_opset_inputs_operators_and_metadata(tmp_path: Path) -> None:
    facts = inspect_path(onnx_text.save(GRAPH, tmp_path / "graph.onnx"))
    assert isinstance(facts, GraphFacts)
    assert facts.opset == 21
    assert list(facts.inputs) == ["x"]
    assert facts.operators == {"Identity": 1, "Relu": 2}
    assert facts.to_dict() == {
        "opset": 21, "inputs": facts.inputs, "outputs": facts.outputs, "operators": facts.operators, **facts.metadata,
    }  # fmt: skip


def test_an_engine_has_its_passport_and_a_run_its_engines_by_name(
    tmp_path: Path, tiny_engine: Callable[..., Path]
) -> None:
    root = RunDir(tmp_path / "run").root
    for name in ("ort-a", "ort-b"):
        shutil.copytree(tiny_engine("ort"), root / "engines" / name)
    facts = inspect_path(root)
    assert isinstance(facts, RunInspection)
    assert list(facts.engines) == ["ort-a", "ort-b"]
    one = inspect_path(root / "engines" / "ort-a")
    assert isinstance(one, EngineInspection)
    assert one == facts.engines["ort-a"]
    assert one.sparsity is None, "ONNX Runtime has no sparse kernels"
    assert entry_at(one.to_dict(), "passport", "engine_sha256") == one.passport.engine_sha256
    printed = json.loads(CliRunner().invoke(main, ["inspect", str(root), "--json"]).stdout)
    assert printed == json.loads(json.dumps(facts.to_dict()))


def test_what_needs_sparse_kernels_or_layer_times_is_refused_for_engines_without(
    tiny_engine: Callable[..., Path],
) -> None:
    with pytest.raises(EngineError, match="only engines for GPUs run sparse kernels"):
        require_sparse(tiny_engine("ort"), 0.5)
    with pytest.raises(EngineError, match="engines of ort do not time their layers; leave --measure out"):
        measure_layers(tiny_engine("ort"))


def test_a_machine_says_of_everything_that_it_is_ready_or_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "version", lambda name: "1.0")
    ready = environment.report().to_dict()
    assert set(ready) == {
        "nxm-export", "python", "system", "cpu", "integer instructions", "gpu", "compress", "export", "backend ort",
        "backend openvino", "backend trt", "backend trt_rtx", "backend cusparselt", "serve",
    }  # fmt: skip
    assert ready["backend ort"] == "ready: onnxruntime 1.0, onnx 1.0, onnx-ir 1.0"
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    missing = environment.report()
    assert missing.backends["ort"] == "missing onnxruntime, onnx, onnx-ir: pip install 'nxm-export[ort]'"


def test_a_runtime_is_found_by_its_module_under_whatever_name_it_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime comes as onnxruntime, onnxruntime-gpu, onnxruntime-openvino and more."""

    def version(name: str) -> str:
        if name in ("onnxruntime", "nxm-export"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(environment, "version", version)
    monkeypatch.setattr(environment, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    assert environment.missing_for("ort") is None
    machine = environment.report()
    assert machine.backends["ort"] == "ready: onnxruntime-gpu 1.0, onnx 1.0, onnx-ir 1.0"
    assert machine.nxm_export == "source tree"


def test_a_runtime_that_cannot_be_imported_does_not_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package is whole by its metadata, and earlier on the path lies one that lacks a library."""
    from nxm_export.cli.first_lines import of_machine

    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text("raise ImportError('libtbb.so.12: no such\\nfile')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    said = "is installed and cannot be loaded (ImportError: libtbb.so.12: no such file)"
    assert said in str(environment.missing_for("openvino"))
    machine = environment.report()
    assert said in machine.backends["openvino"]
    assert "openvino" not in of_machine(machine).partition(".")[0]
    with pytest.raises(EngineUnavailable, match=r"backend openvino cannot run here: openvino .* cannot be loaded \("):
        run_backends(("openvino",))


def test_no_run_begins_without_the_runtime_of_its_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    for asked in ((), ("auto",), ("ort",), ("trt_rtx", "ort")):
        with pytest.raises(EngineUnavailable, match=r"backend (ort|trt_rtx) cannot run here: ") as refusal:
            run_backends(asked)
        assert "trt_rtx" in asked or "importing it ends the process (SIGABRT)" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("print('hello')", None),
        ("print('hello')\nraise RuntimeError('no\\nroom')", "RuntimeError: no room"),
        ("import absent_library", "ModuleNotFoundError: No module named 'absent_library'"),
        ("import os; os._exit(7)", "importing it ends the process (exit code 7)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "importing it ends the process (SIGILL)"),
    ],
)
def test_an_import_is_tried_where_it_can_break_nothing(
    text: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tried_library.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert import_problem("tried_library") == problem
    assert "tried_library" not in sys.modules


def test_a_folder_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory has one called ``onnx``."""
    (tmp_path / "tried_library").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not environment._is_here("tried_library")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--twin", {"twin": Path("dense")}),
        ("--kernels", {"kernels": Path("kernels.txt")}),
        ("--measure", {"measure": True}),
    ],
)
def test_what_only_a_tensorrt_engine_answers_is_refused_elsewhere_and_not_dropped(
    tmp_path: Path, tiny_engine: Callable[..., Path], option: str, values: Mapping[str, Any]
) -> None:
    run = RunDir(tmp_path / "run").root
    for path in (tiny_engine("ort"), onnx_text.save(GRAPH, tmp_path / "graph.onnx"), run):
        with pytest.raises(
            EngineError, match=rf"{option} asks of sparse kernels, which only engines for GPUs have; leave it out here"
        ):
            inspect_path(path, **values)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\nexec sleep 20\n", "nvidia-smi did not answer in 0.5 seconds"),
        ("no program", "nvidia-smi failed: "),
        ("#!/bin/sh\necho no devices >&2; exit 9\n", "nvidia-smi failed: no devices"),
    ],
)
def test_a_driver_s_tool_without_a_driver_is_no_gpu(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers have the tool where they have no GPU, and a broken driver lets it hang."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(environment, "_PATIENCE", 0.5)
    monkeypatch.setattr(environment, "_is_here", lambda _: True)
    assert environment._gpu().startswith(said)
    if shutil.which("nvidia-smi", path=os.defpath) is None:
        assert "without an NVIDIA GPU (" in str(environment.missing_for("trt"))


def test_a_gpu_is_found_by_its_driver_where_the_driver_s_tool_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.tensorrt import cuda_driver

    facts = {"gpu": "NVIDIA H200", "compute_capability": "9.0", "driver": "580.159.03", "cuda": "13.0"}
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cuda_driver, "device_facts", lambda: facts)
    monkeypatch.setattr(cuda_driver, "device_memory", lambda: 143771 * 2**20)
    assert environment._gpu() == "NVIDIA H200, 9.0, 580.159.03, 143771 MiB"

    def absent() -> NoReturn:
        raise EngineUnavailable("libcuda.so.1 is not on this machine")

    monkeypatch.setattr(cuda_driver, "device_facts", absent)
    assert environment._gpu().startswith("no NVIDIA driver found (nvidia-smi is not there)")


def test_names_of_kernels_that_are_no_text_are_refused_by_file(tmp_path: Path) -> None:
    """As UTF-16, which some profilers write."""
    (tmp_path / "kernels.txt").write_text("a\n\n b \n", encoding="utf-8")
    assert _kernel_names(tmp_path / "kernels.txt") == ["a", "b"]
    (tmp_path / "kernels.txt").write_text("a\nb\n", encoding="utf-16")
    with pytest.raises(ArtifactError, match=r"kernels\.txt: cannot be read .*; give a text file with one kernel name"):
        _kernel_names(tmp_path / "kernels.txt")
