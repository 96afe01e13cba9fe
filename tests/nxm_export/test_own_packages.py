"""A user's own folder of the same name does not take the place of a package of ours unnoticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "nxm_export", "doctor"]
LIBRARY = ["-c", "import nxm_export.pipeline"]
PUBLIC = ["-c", "import nxm_export; nxm_export.load"]


def importing_modules() -> list[str]:
    """One module of every subpackage of `nxm_export` that imports `compressors` or `engines`, at its top or later."""
    line = re.compile(r"^ *(from|import) (compressors|engines)\b", re.MULTILINE)
    files = [file for file in sorted((ROOT / "nxm_export").glob("*/*.py")) if line.search(file.read_text("utf-8"))]
    return [f"nxm_export.{name}.{file.stem}" for name, file in {file.parent.name: file for file in files}.items()]


def python(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Python started in `directory`, which it then searches first, with our packages behind it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(params=["engines", "compressors"])
def package(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A regular package of the user's, in the directory that Python is started in."""
    folder: Path = tmp_path / request.param
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    return folder


def test_the_command_names_the_folder_and_the_way_out_in_one_line(package: Path) -> None:
    done = python(COMMAND, package.parent)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    expected = f"nxm: {package.name} is {package}, not the package of nxm-export in {ROOT}: rename that folder"
    assert line == f"{expected} or run from another directory"


@pytest.mark.parametrize("arguments", [LIBRARY, PUBLIC])
def test_the_library_says_the_same_as_an_error(package: Path, arguments: list[str]) -> None:
    done = python(arguments, package.parent)
    assert done.returncode == 1
    assert f"NxmError: {package.name} is {package}, not the package of nxm-export" in done.stderr.splitlines()[-1]


def test_the_subpackages_that_need_them_are_those_we_know() -> None:
    assert {name.split(".")[1] for name in importing_modules()} == {"api", "cli", "pipeline", "reporting"}


@pytest.mark.parametrize("module", importing_modules())
def test_every_subpackage_that_needs_them_looks_before_it_imports(package: Path, module: str) -> None:
    done = python(["-c", f"import {module}"], package.parent)
    assert done.returncode == 1
    assert f"{package.name} is {package}, not the package of nxm-export" in done.stderr.splitlines()[-1]


def test_the_functions_of_a_subpackage_look_too(package: Path) -> None:
    done = python(["-c", "from nxm_export.reporting import card"], package.parent)
    assert f"NxmError: {package.name} is {package}, not the package" in done.stderr


def test_a_module_of_that_name_is_noticed_too(tmp_path: Path) -> None:
    (tmp_path / "engines.py").write_text("")
    done = python(LIBRARY, tmp_path)
    assert f"NxmError: engines is {tmp_path / 'engines.py'}, " in done.stderr
    assert "rename that file" in done.stderr


@pytest.mark.parametrize("arguments", [COMMAND, LIBRARY])
def test_a_folder_without_init_is_no_package_and_does_no_harm(tmp_path: Path, arguments: list[str]) -> None:
    """A run directory has a folder ``engines``: Python prefers our package to it, wherever it stands."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "base.py").write_text("raise SystemExit('imported')\n")
    done = python(arguments, tmp_path)
    assert done.returncode == 0, done.stderr


def test_another_package_that_was_imported_before_is_noticed(tmp_path: Path) -> None:
    code = "import sys, types; sys.modules['engines'] = types.ModuleType('engines'); import nxm_export.pipeline"
    assert "engines, a package of nxm-export, is missing" in python(["-c", code], tmp_path).stderr


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Without site-packages, next to a copy of `nxm_export` that came alone."""
    (tmp_path / "nxm_export").mkdir()
    for name in ("__init__.py", "errors.py", "own_packages.py"):
        (tmp_path / "nxm_export" / name).write_text((ROOT / "nxm_export" / name).read_text())
    code = "from nxm_export.own_packages import require_own_packages; require_own_packages()"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert f"compressors, a package of nxm-export, is missing in {tmp_path}: install nxm-export again" in done.stderr


def test_looking_imports_nothing(tmp_path: Path) -> None:
    code = """
import sys
from nxm_export.own_packages import require_own_packages
before = set(sys.modules)
require_own_packages()
print(sorted(name for name in set(sys.modules) - before))
"""
    done = python(["-c", code], tmp_path)
    assert done.stdout == "[]\n", done.stderr
