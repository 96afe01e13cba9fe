"""The program that checks a repository in the container that is to serve it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.triton import export_repository
from engines.triton.check_manifest import problems, version_text


def test_a_manifest_names_every_file_and_notices_a_change(plans: list[EngineSource], tmp_path: Path) -> None:
    manifest = export_repository(plans, tmp_path / "repo", TritonOptions(text=True))
    repository = tmp_path / "repo"
    assert json.loads(json.dumps(manifest.to_dict())) == json.loads((repository / "manifest.json").read_text())
    written = {
        p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file() and p.parent != repository
    }
    assert set(manifest.files) == written
    assert problems(repository, "10.14.1") == []
    (repository / "planned" / "1" / "model_sm80.plan").write_bytes(b"other")
    (repository / "planned_tokenizer" / "1" / "model.py").unlink()
    assert problems(repository, "10.14.1") == [
        "planned/1/model_sm80.plan is not the file that was written",
        "planned_tokenizer/1/model.py is missing",
    ]
    (repository / "manifest.json").write_text(json.dumps({**manifest.to_dict(), "schema": "nxm-triton/9"}))
    (complaint,) = problems(repository, "10.14.1")
    assert "schema nxm-triton/9 is not the nxm-triton/1 that this program reads" in complaint
    (repository / "manifest.json").write_text(json.dumps({"files": {}, "tensorrt": None}))
    (complaint,) = problems(repository, "10.14.1")
    assert "cannot be read (KeyError('schema'))" in complaint


def test_a_model_or_version_that_was_not_written_is_named(engine: Path, tmp_path: Path) -> None:
    """Left over from another repository, say: Triton would serve version 2 in place of the proven engine."""
    repository = tmp_path / "repo"
    export_repository([EngineSource("m", "1", engine)], repository)
    (repository / "m" / "1" / "__pycache__").mkdir()
    (repository / "m" / "1" / "__pycache__" / "model.pyc").touch()
    (repository / ".git").mkdir()
    (repository / ".git" / "HEAD").touch()
    (repository / "notes.txt").touch()
    assert problems(repository, None) == []
    for name in ("m/2", "former/1"):
        (repository / name).mkdir(parents=True)
        (repository / name / "model.onnx").write_bytes(b"another")
    assert problems(repository, None) == [
        "former/1/model.onnx was not written here, and Triton may serve it; remove it",
        "m/2/model.onnx was not written here, and Triton may serve it; remove it",
    ]


@pytest.mark.parametrize(
    ("version", "fits"), [("10.14.1", True), ("10.14.1.48", True), ("10.14.2", False), ("8.6.1", False), (None, False)]
)
def test_plans_want_the_containers_tensorrt(
    plans: list[EngineSource], tmp_path: Path, version: str | None, fits: bool
) -> None:
    export_repository(plans, tmp_path / "repo")
    assert (problems(tmp_path / "repo", version) == []) is fits


@pytest.mark.parametrize(
    ("number", "text"), [(8601, "8.6.1"), (8503, "8.5.3"), (100001, "10.0.1"), (101401, "10.14.1"), (110400, "11.4.0")]
)
def test_tensorrts_version_number_is_read_as_nvidia_writes_it(number: int, text: str) -> None:
    assert version_text(number) == text


def test_the_check_runs_alone_and_starts_the_server_only_when_all_is_well(
    engine: Path, plans: list[EngineSource], tmp_path: Path
) -> None:
    export_repository([EngineSource("m", "1", engine)], tmp_path / "onnx")
    export_repository(plans, tmp_path / "plans")
    compiler = shutil.which("cc") or shutil.which("gcc")
    library = tmp_path / "lib"
    library.mkdir()
    if compiler:  # a library with TensorRT's one function that is asked
        (library / "nvinfer.c").write_text("int getInferLibVersion(void) { return 101401; }\n")
        subprocess.run([compiler, "-shared", "-o", library / "libnvinfer.so.10", library / "nvinfer.c"], check=True)

    def run(name: str, libraries: str) -> subprocess.CompletedProcess[str]:
        repository = tmp_path / name
        command = [
            sys.executable,
            "-I",
            str(repository / "check_manifest.py"),
            str(repository),
            "--",
            "echo",
            "started",
        ]
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    assert run("onnx", "").stdout == "started\n"
    refused = run("plans", "")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "built by TensorRT 10.14.1.48, and this container has none" in refused.stderr
    if compiler:
        assert run("plans", str(library)).stdout == "started\n"
