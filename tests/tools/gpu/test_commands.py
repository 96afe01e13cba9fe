"""Every tool says what it does, what is missing and which value is wrong; rehearsals of the README run."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import ROOT

COMMANDS = (
    "evidence",
    "sparse_kernels",
    "training_probe",
    "glue_rows",
    "checkpoints",
    "issue4694",
    "cusparselt.__main__",
    "engine_twins",
    "fake_accelerator.__main__",
    "tensorrt86.pack",
    "tensorrt86.unpack",
    "tensorrt86.graphs",
    "tensorrt86.engines",
    "tensorrt86.evidence",
)
# Lines of the README that need nothing packed and no finished run; the others are tests of their tools, on tiny models.
REHEARSALS = [
    line.strip()
    for line in (ROOT / "tools" / "gpu" / "README.md")
    .read_text(encoding="utf-8")
    .split("## Without a GPU")[1]
    .splitlines()
    if line.startswith("    python ") and " .gpu-" not in line and " RUN " not in line
]
# What the carried Python 3.10 imports there, besides the packages that keep to it anyway.
ON_310 = ("__init__", "rendering", "gpu/__init__", "gpu/evidence", "gpu/tensorrt86/__init__", "gpu/tensorrt86/engines")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        importlib.import_module(f"tools.gpu.{command}").main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: " in shown
    assert len(shown) > 300


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evidence", ["--work", "{}"], "needs an NVIDIA GPU and its driver"),
        ("cusparselt.__main__", ["--out", "{}/x.json"], "no CUDA device here; --rehearse"),
        ("engine_twins", ["--out", "{}/twins"], "no engine of cusparselt can be built or run here"),
        ("training_probe", ["run", "{}", "--out", "{}"], "no CUDA device here; --cpu-only"),
        ("glue_rows", ["run", "{}", "--out", "{}"], "no CUDA device here; --cpu-only"),
        ("tensorrt86.unpack", ["--folder", "{}"], "manifest.json is missing"),
        ("tensorrt86.engines", ["{}", "{}", "a:b:1x8"], "TensorRT is not installed"),
        ("tensorrt86.evidence", ["--out", "{}", "--place", "{}"], "python310 is missing"),
        ("sparse_kernels", ["{}/lib.so"], "no such file"),
    ],
)
def test_what_is_missing_is_said_in_a_line(
    command: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    filled = [argument.format(tmp_path) for argument in arguments]
    assert importlib.import_module(f"tools.gpu.{command}").main(filled) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evidence", ["--models", "minilm,tony"], "'tony' is none of tiny, minilm"),
        ("evidence", ["--shapes", "8x128,0x64"], "'0x64' has '0' where a number"),
        ("engine_twins", ["--out", "{}", "--models", "tony"], "'tony' is none of tiny, minilm"),
        ("engine_twins", ["--out", "{}", "--shapes", "8by3"], "'8by3' has '8by3' where a number"),
        ("issue4694", ["--presets", "int9-out"], "'int9-out' is none of float-out, int8-out"),
        ("issue4694", ["--shape", "8x"], "'8x' has '' where a number"),
        ("cusparselt.__main__", ["--out", "{}/x.json", "--models", "tony"], "'tony' is none of "),
        ("cusparselt.__main__", ["--out", "{}/x.json", "--models", ""], "'' is none of "),
        ("cusparselt.__main__", ["--out", "{}/x.json", "--rows", "1024,many"], "'1024,many' has 'many'"),
        ("fake_accelerator.__main__", ["{}/nowhere"], "nowhere has no dense/"),
        ("tensorrt86.engines", ["{}", "{}", "a:b:1xlong"], "'1xlong' has 'long'"),
    ],
)
def test_a_wrong_value_is_said_in_a_line(
    command: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as done:
        importlib.import_module(f"tools.gpu.{command}").main(filled)
    assert done.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("training_probe", ["run", "{}/nowhere", "--out", "{}", "--cpu-only"], "nowhere has no dense/"),
        ("glue_rows", ["run", "{}/nowhere", "--out", "{}", "--cpu-only"], "rows.json: cannot be read"),
        ("cusparselt.__main__", ["--out", "{}/file/x.json", "--rehearse"], "file: cannot be made ("),
        ("engine_twins", ["--out", "{}/file", "--rehearse", "--models", "tiny"], "file: cannot be made ("),
    ],
)
def test_a_rehearsal_that_cannot_begin_says_so(
    command: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    filled = [argument.format(tmp_path) for argument in arguments]
    assert importlib.import_module(f"tools.gpu.{command}").main(filled) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("line", REHEARSALS)
def test_a_rehearsal_of_the_readme_runs_as_it_stands(line: str, tmp_path: Path) -> None:
    if "issue4694" in line:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")
    written = line.replace("/tmp/", f"{tmp_path}/").replace("python", sys.executable, 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(written.split(), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("module", ON_310)
def test_what_the_carried_python_imports_keeps_its_syntax(module: str) -> None:
    ast.parse((ROOT / "tools" / f"{module}.py").read_text(encoding="utf-8"), feature_version=(3, 10))
