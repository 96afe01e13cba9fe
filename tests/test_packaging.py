"""The wheel: what is in it, and that it works in an environment that has nothing but it and its core dependencies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from nxm_export.pipeline import environment
from tests.conftest import ROOT
from tests.test_layering import PACKAGES
from tests.test_light_imports import LIGHT, python310

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command outside the source tree, as a user would: without our PYTHONPATH, with this machine's network."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment, cwd=cwd
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, ROOT)
    assert built.returncode == 0, built.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` directory of an environment with the wheel and its core dependencies."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv")
    bin_ = home / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", bin_ / "python", "--quiet", "--disable-pip-version-check")
    fetched = run(*pip, "install", *PROJECT["dependencies"])
    if fetched.returncode:
        pytest.skip(f"the core dependencies cannot be installed here: {fetched.stderr.strip().splitlines()[-1:]}")
    installed = run(*pip, "install", "--no-index", wheel)  # all that it needs is there already
    assert installed.returncode == 0, installed.stderr
    return bin_


def test_the_wheel_ships_exactly_the_three_packages(wheel: Path) -> None:
    tree = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert shipped == tree
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped
    other = {name for name in shipped if Path(name).suffix not in (".py", ".typed")}
    data = {
        "engines/sparsity/gpu_figures.json",
        "engines/sparsity/sparse_kernels.json",
        "engines/serving/openapi.json",
        "nxm_export/graph/tensorrt_operators.json",
    }
    templates = {f"nxm_export/reporting/{name}" for name in ("page.html.j2", "page.css", "card.md.j2")}
    assert other == data | templates, "and what the code reads beside it"


def test_the_wheel_carries_licence_notice_and_entry_point(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in archive.namelist()}
    assert "Apache License" in text["licenses/LICENSE"]
    assert "rotten_tomatoes" in text["licenses/NOTICE"]
    assert "nxm = nxm_export.cli:main" in text["entry_points.txt"]
    assert "Requires-Python: >=3.10" in text["METADATA"]


def test_nxm_answers_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    helped = run(clean / "nxm", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert "compress" in helped.stdout
    version = run(clean / "nxm", "--version", cwd=tmp_path)
    assert version.stdout.startswith("nxm, version ")


def test_doctor_says_what_to_install_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    done = run(clean / "nxm", "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    for what, extra in (
        ("compress", "train"),
        ("export", "export"),
        ("backend ort", "ort"),
        ("backend openvino", "openvino"),
        ("backend trt_rtx", "trt-rtx"),
        ("serve", "serve"),
    ):
        assert f"nxm-export[{extra}]" in facts[what]
        assert extra in PROJECT["optional-dependencies"]


def test_contract_and_engines_import_from_the_wheel_without_torch(clean: Path, tmp_path: Path) -> None:
    code = f"import sys, {', '.join(LIGHT)}; assert 'torch' not in sys.modules; print(engines.base.__file__)"
    done = run(clean / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(clean.parent) in done.stdout, "the wheel's own files are what was imported"


@pytest.mark.parametrize(
    ("command", "extra"),
    [("compress model --train a.tsv --dev b.tsv --out c", "train"), ("serve engine", "serve")],
    ids=["compress", "serve"],
)
def test_a_command_that_needs_an_extra_says_which(clean: Path, tmp_path: Path, command: str, extra: str) -> None:
    done = run(clean / "nxm", *command.split(), cwd=tmp_path)
    assert done.returncode == 1
    assert f"nxm-export[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_training_and_export_need_a_newer_python_than_the_rest() -> None:
    extras = PROJECT["optional-dependencies"]
    marked = {extra for extra, needs in extras.items() if any("python_version >= '3.11'" in need for need in needs)}
    assert marked == {"train", "export"}
    assert not [need for need in PROJECT["dependencies"] if "python_version" in need]


@pytest.mark.parametrize(
    ("extra", "version"), [("train", (3, 10)), ("export", (3, 10)), ("ort", (3, 10)), ("train", (3, 11))]
)
def test_a_host_with_python_3_10_is_told_what_it_cannot_do(
    extra: str, version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.version_info", (*version, 0))
    advice = environment.install_advice(extra)
    if extra != "ort" and version < (3, 11):
        assert "training and export need Python 3.11 or newer" in advice
        assert "copy the engine directory here" in advice
    else:
        assert advice == f"pip install 'nxm-export[{extra}]'"


@pytest.mark.slow
def test_the_wheel_answers_on_python_3_10(wheel: Path, tmp_path: Path) -> None:
    interpreter = python310()
    if interpreter is None:
        pytest.skip("no Python 3.10 on this machine (python3.10 on PATH, or one of pyenv's)")
    run(interpreter, "-m", "venv", "--without-pip", tmp_path / "venv")
    bin_ = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", bin_ / "python", "--quiet", "--disable-pip-version-check")
    installed = run(*pip, "install", wheel)
    if installed.returncode:
        pytest.skip(f"the dependencies cannot be installed here: {installed.stderr.strip().splitlines()[-1:]}")
    helped = run(bin_ / "nxm", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    refused = run(bin_ / "nxm", "compress", "m", "--train", "a", "--dev", "b", "--out", "c", cwd=tmp_path)
    assert refused.returncode == 1
    assert "training and export need Python 3.11 or newer" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_every_optional_import_of_the_tests_is_in_the_dev_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["dev"][0] == "nxm-export[all]"
    named = set(extras["all"][0].removeprefix("nxm-export[").removesuffix("]").split(","))
    assert named == extras.keys() - {"all", "dev"}, "`all` names every extra"


def test_the_page_on_installing_names_every_extra() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \|", page.partition("| extra | for |")[2], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([a-z-]+)`", row)]
    assert sorted(named) == sorted(PROJECT["optional-dependencies"])
