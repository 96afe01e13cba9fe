"""The API that our code uses exists in the real bindings of TensorRT 8.6, 10.3, 11.4 and RTX 1.7."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parents[2]
GOLDEN = ROOT / "tests" / "golden" / "trt"
SOURCES = ("builder_process.py", "runtime.py", "backend.py", "rtx_backend.py")
OPTIONAL = {"8.6": {"IProgressMonitor"}}  # used behind hasattr
STUB = "nvinfer nvinfer_plugin nvonnxparser"
STUB_SYMBOLS = """
    createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
    createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion
    getPluginRegistry initLibNvInferPlugins
"""


def references() -> set[tuple[str, ...]]:
    """Every ``trt.A`` and ``trt.A.B`` of our sources, as (A,) or (A, B)."""
    references = set()
    for name in SOURCES:
        for node in ast.walk(ast.parse((ROOT / "engines" / "tensorrt" / name).read_text(encoding="utf-8"))):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if parts and (
                (isinstance(node, ast.Name) and node.id == "trt")
                or (parts[-1] == "_trt" and isinstance(node, ast.Name) and node.id == "self")
            ):
                references.add(tuple(part for part in reversed(parts) if part != "_trt")[:2])
    return {parts for parts in references if parts and not parts[0].startswith("_")}


@pytest.mark.parametrize("version", ["8.6", "10.3", "11.4", "rtx-1.7"])
def test_every_class_and_flag_that_our_sources_name_exists(version: str) -> None:
    classes = json.loads((GOLDEN / f"api-{version}.json").read_text(encoding="utf-8"))["classes"]
    named = {parts for parts in references() if parts[0] not in OPTIONAL.get(version, ())}
    assert len(named) > 10, "the scan finds what our code uses"
    for first, *rest in sorted(named):
        assert first in classes, f"trt.{first} is not in TensorRT {version}"
        kind = classes[first]
        known = {*kind.get("enum", ()), *kind.get("methods", ()), *kind.get("properties", ()), *kind.get("enums", ())}
        for name in rest:
            assert name in known or name.startswith("__"), f"trt.{first}.{name} is not in TensorRT {version}"


def test_what_tensorrt_11_removed_is_used_nowhere() -> None:
    new = json.loads((GOLDEN / "api-11.4.json").read_text(encoding="utf-8"))["classes"]
    assert not {"FP16", "INT8", "BF16"} & set(new["BuilderFlag"]["enum"])
    text = "".join((ROOT / "engines" / "tensorrt" / name).read_text(encoding="utf-8") for name in SOURCES)
    for gone in (
        "set_dynamic_range",
        "platform_has_fast",
        "max_workspace_size",
        "EXPLICIT_BATCH",
        "STRICT_NANS",
        "execute_async_v2",
    ):
        assert gone not in text


def dump(python: str, module: str, out: Path, env: dict[str, str]) -> dict[str, Any]:
    command = [python, str(TESTS / "api_surface.py"), module, str(out)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    surface: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return surface


@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiling stub libraries needs gcc")
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_bindings") is None,
    reason="TensorRT's bindings are not installed: pip install --no-deps tensorrt-cu13-bindings==11.4.0.106",
)
def test_the_recorded_api_of_11_4_is_that_of_the_real_bindings(tmp_path: Path) -> None:
    """The bindings load on empty libraries, because nothing is called."""
    source = tmp_path / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in STUB_SYMBOLS.split()))
    for name in STUB.split():
        library = f"lib{name}.so.11"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(tmp_path / library), str(source)]
        subprocess.run(command, check=True)
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None
    (place,) = spec.submodule_search_locations or [""]
    paths = os.pathsep.join(
        [str(Path(place).parent), os.environ.get("PYTHONPATH", "")]
    )  # it may lie outside this environment
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": paths}
    actual = dump(sys.executable, "tensorrt_bindings", tmp_path / "api.json", environment)
    recorded = json.loads((GOLDEN / "api-11.4.json").read_text(encoding="utf-8"))
    if actual["version"] != recorded["version"]:
        pytest.skip(f"the installed bindings are {actual['version']}, the record is of {recorded['version']}")
    assert actual["classes"] == recorded["classes"]


def test_the_recorded_api_of_rtx_is_that_of_the_installed_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")
    actual = dump(sys.executable, "tensorrt_rtx", tmp_path / "api.json", {})
    recorded = json.loads((GOLDEN / "api-rtx-1.7.json").read_text(encoding="utf-8"))
    if actual["version"] != recorded["version"]:
        pytest.skip(f"the installed TensorRT-RTX is {actual['version']}, the record is of {recorded['version']}")
    assert actual["classes"] == recorded["classes"]


@pytest.mark.skipif(
    "NXM_TENSORRT_86_PYTHON" not in os.environ,
    reason="needs a Python 3.10 with tensorrt==8.6.0 and numpy (819 MB): name it in NXM_TENSORRT_86_PYTHON",
)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiling stub libraries needs gcc")
def test_the_recorded_api_of_8_6_is_that_of_the_real_wheel(tmp_path: Path) -> None:
    source = tmp_path / "stub.c"
    source.write_text("int nothing;\n")
    for library in ("libcublas.so.12", "libcublasLt.so.12", "libcudnn.so.8"):
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(tmp_path / library), str(source)]
        subprocess.run(command, check=True)
    python = os.environ["NXM_TENSORRT_86_PYTHON"]
    actual = dump(python, "tensorrt", tmp_path / "api.json", {"LD_LIBRARY_PATH": str(tmp_path)})
    recorded = json.loads((GOLDEN / "api-8.6.json").read_text(encoding="utf-8"))
    assert (actual["version"], actual["classes"]) == (recorded["version"], recorded["classes"])
