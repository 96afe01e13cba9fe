"""The contract and the engines import with numpy and msgspec alone, on Python 3.10 too; the command line answers
``--help`` at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxm_export.cli import main
from tests.test_layering import LIGHT_LAYERS, MODULES, layer

LIGHT = sorted(name for name in MODULES if layer(name) in LIGHT_LAYERS)
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt_rtx",
    "polygraphy",
    "rich",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "tokenizers",
)

# Refuses every module that is not in the standard library, numpy, msgspec or ours, then imports the light ones.
_ONLY_NUMPY = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        here = ("numpy", "msgspec", "nxm_export", "compressors", "engines", "sitecustomize")
        if top not in sys.stdlib_module_names and top not in here:
            raise ImportError("this host has numpy and msgspec only, and something imports " + name)
sys.meta_path.insert(0, Refuse())
for module in {LIGHT!r}:
    importlib.import_module(module)
"""

# What a TensorRT 8.6 host does first: reads the plan and the passport that came with an engine.
_READ = """
import sys
from pathlib import Path
from engines.base import BACKENDS
from nxm_export.contract.plan import CompressionPlan
text = Path(sys.argv[1]).read_text(encoding="utf-8")
assert CompressionPlan.from_json(text).to_json() == text
print("read", sys.version_info[:2], list(BACKENDS))
"""


def python(code: str, *arguments: str, interpreter: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([interpreter, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_contract_and_engines_import_with_numpy_and_msgspec_alone() -> None:
    child = python(_ONLY_NUMPY)
    assert child.returncode == 0, child.stderr


def test_help_of_every_command_loads_no_heavy_library() -> None:
    commands = [[], *([name] for name in main.commands)]
    code = f"""
import json, sys
from nxm_export.cli import main
for command in {commands!r}:
    try:
        main([*command, "--help"])
    except SystemExit as done:
        assert done.code == 0
print("loaded", json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))
"""
    child = python(code)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_of_a_command_says_what_it_does_and_what_it_takes(command: str) -> None:
    """All of it: ``--help-all`` where ``--help`` shows the common options alone."""
    everything = "--help-all" if any("--help-all" in p.opts for p in main.commands[command].params) else "--help"
    result = CliRunner().invoke(main, [command, everything])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")
    for parameter in main.commands[command].params:
        option = parameter.param_type_name == "option"
        shown = parameter.opts[0] if option else parameter.metavar or str(parameter.name).upper()
        assert shown in result.output
    summary = main.commands[command].get_short_help_str(limit=200)
    assert summary.endswith(".")


def python310() -> str | None:
    """A Python 3.10 on this machine: on the path, or one of pyenv's."""
    found = [shutil.which("python3.10"), *map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python"))]
    for candidate in filter(None, found):
        try:
            if python("import sys; print(sys.version_info[:2])", interpreter=candidate).stdout.strip() == "(3, 10)":
                return candidate
        except OSError:
            continue
    return None


@pytest.fixture(scope="session")
def numpy_on_310(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a Python 3.10 environment that holds numpy, msgspec and nothing else."""
    interpreter = python310()
    if interpreter is None:
        pytest.skip("no Python 3.10 on this machine (python3.10 on PATH, or one of pyenv's)")
    home = tmp_path_factory.mktemp("python310")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # pip needs the network
    subprocess.run([interpreter, "-m", "venv", "--without-pip", str(home)], check=True, env=environment)
    made = str(home / "bin" / "python")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        made,
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "numpy",
        "msgspec",
    ]
    done = subprocess.run(install, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        pytest.skip(
            f"numpy and msgspec for Python 3.10 cannot be installed here: {done.stderr.strip().splitlines()[-1:]}"
        )
    return made


def test_contract_and_engines_run_on_python_3_10(numpy_on_310: str, tiny_checkpoint: Callable[..., Path]) -> None:
    child = python(_ONLY_NUMPY, interpreter=numpy_on_310)
    assert child.returncode == 0, child.stderr
    child = python(_READ, str(tiny_checkpoint("bert") / "nxm_plan.json"), interpreter=numpy_on_310)
    assert child.stdout.startswith("read (3, 10)"), child.stderr


def test_the_list_of_light_modules_is_not_empty() -> None:
    assert {
        "nxm_export.contract.plan",
        "nxm_export.data.metrics",
        "engines.base",
        "engines.ort.backend",
        "engines.parity.compare",
    } <= set(LIGHT)
