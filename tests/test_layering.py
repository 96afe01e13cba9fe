"""Who may import whom, read from the source. The picture is in docs/concepts.md.

An import is *eager* when importing the module runs it, *lazy* when it stands inside a function. Imports under
``if TYPE_CHECKING`` run never, and count only between `compressors` and `engines`, which do not know each other at all.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("nxm_export", "compressors", "engines")
# Folder -> layer; the longest name that fits counts. Modules beside the folders of `nxm_export` have a line of their
# own.
LAYERS = {
    "nxm_export.errors": "errors",
    "nxm_export.progress": "errors",
    "nxm_export.own_packages": "errors",
    "nxm_export.storage": "storage",
    "nxm_export.contract": "contract",
    "nxm_export.data": "data",
    "nxm_export.hf": "hf",
    "nxm_export.graph": "graph",
    "compressors.settings": "settings",
    "compressors.search.settings": "settings",
    "compressors": "compressors",
    "engines.serving.settings": "engine settings",
    "engines": "engines",
    "nxm_export.pipeline": "pipeline",
    "nxm_export.reporting": "reporting",
    "nxm_export.api": "api",
    "nxm_export.cli": "cli",
    "nxm_export.__main__": "cli",
    "nxm_export": "public",
}


@dataclass(frozen=True)
class Import:
    """One import statement of a module: what it names, and when it runs (``eager``, ``lazy`` or ``typing``)."""

    target: str
    when: str
    line: int


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer(module: str) -> str:
    if module.partition(".")[0] not in PACKAGES:
        return "third party"
    parts = module.split(".")
    name = next(name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in LAYERS)
    assert name != "nxm_export" or module == name, f"{module} is in no layer: name its folder in LAYERS"
    return LAYERS[name]


def imports(file: Path) -> Iterator[Import]:
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")), "eager")


def _walk(node: ast.AST, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inner = when
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "lazy"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            inner = "typing"
        elif isinstance(child, ast.If) and "__main__" in ast.dump(child.test):
            inner = "lazy"
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, when, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name their module in full"
            yield from _targets(child, when)
        yield from _walk(child, inner)


def _targets(node: ast.ImportFrom, when: str) -> Iterator[Import]:
    """``from package import module`` names the module, ``from module import thing`` the module, too."""
    module = node.module or ""
    for alias in node.names:
        below = ROOT.joinpath(*module.split("."), alias.name).with_suffix(".py")
        yield Import(f"{module}.{alias.name}" if below.is_file() else module, when, node.lineno)


MODULES = {
    module_name(file): list(imports(file)) for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))
}

_CONTRACT = {"errors": "eager", "storage": "eager", "contract": "eager", "data": "eager", "public": "eager"}
# layer -> {layer it may import: how}; "lazy" allows imports inside functions only
ALLOWED = {
    "errors": {"errors": "eager"},
    "storage": {"errors": "eager", "storage": "eager"},
    "contract": {"errors": "eager", "storage": "eager", "contract": "eager"},
    "data": _CONTRACT,
    "hf": _CONTRACT | {"hf": "eager"},
    "graph": _CONTRACT | {"graph": "eager", "hf": "eager"},
    "settings": {"errors": "eager", "storage": "eager", "contract": "eager", "settings": "eager"},
    "compressors": _CONTRACT | {"settings": "eager", "compressors": "eager", "hf": "eager"},
    "engine settings": {"errors": "eager", "contract": "eager"},
    "engines": _CONTRACT | {"engine settings": "eager", "engines": "eager", "graph": "lazy", "hf": "eager"},
    "reporting": _CONTRACT | {"reporting": "eager", "engines": "lazy"},
    "pipeline": _CONTRACT
    | {
        "pipeline": "eager",
        "settings": "eager",
        "hf": "lazy",
        "graph": "lazy",
        "compressors": "lazy",
        "engines": "lazy",
    },
    "cli": _CONTRACT
    | {
        "cli": "eager",
        "settings": "eager",
        "engine settings": "eager",
        "pipeline": "lazy",
        "reporting": "lazy",
        "graph": "lazy",
        "compressors": "lazy",
        "engines": "lazy",
    },
    "api": _CONTRACT
    | {
        "api": "eager",
        "pipeline": "eager",
        "settings": "eager",
        "engine settings": "lazy",
        "reporting": "lazy",
        "graph": "lazy",
        "compressors": "lazy",
        "engines": "lazy",
    },
    "public": {"errors": "lazy"},
}
# What importing a module of this layer may load besides the standard library.
EAGER_THIRD_PARTY = {
    "errors": set(),
    "storage": {"msgspec"},
    "contract": {"numpy"},
    "data": {"numpy"},
    "hf": set(),
    "graph": {"numpy", "onnx_ir"},
    "settings": set(),
    "engine settings": set(),
    "compressors": {"numpy", "safetensors", "torch", "transformers"},
    "engines": {"numpy"},
    "reporting": {"numpy", "jinja2", "markupsafe", "matplotlib"},
    "pipeline": {"numpy"},
    "api": set(),
    "cli": {"click"},
    "public": set(),
}
# These run on hosts of engines: Python 3.10, without torch and transformers.
LIGHT_LAYERS = ("errors", "storage", "contract", "data", "settings", "engine settings", "hf", "engines", "public")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_the_layers_below_it(module: str) -> None:
    allowed = ALLOWED[layer(module)]
    for found in MODULES[module]:
        if layer(found.target) == "third party" or found.when == "typing":
            continue
        how = allowed.get(layer(found.target))
        assert how is not None, f"{module}:{found.line} imports {found.target}: {layer(found.target)} is not below it"
        assert how == "eager" or found.when == "lazy", (
            f"{module}:{found.line} imports {found.target} at import time; move it into the function that needs it"
        )


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_loads_only_the_libraries_of_its_layer(module: str) -> None:
    for found in MODULES[module]:
        top = found.target.partition(".")[0]
        if found.when != "eager" or top in sys.stdlib_module_names or top in PACKAGES:
            continue
        assert top in EAGER_THIRD_PARTY[layer(module)], f"{module}:{found.line} imports {top} at import time"


@pytest.mark.parametrize(
    "module", [name for name in MODULES if layer(name) in ("errors", "storage", "contract", "data")]
)
def test_the_contract_knows_no_torch_inside_functions_either(module: str) -> None:
    assert not {i.target.partition(".")[0] for i in MODULES[module]} & {"torch", "transformers"}


def test_compressors_and_engines_do_not_know_each_other() -> None:
    for module, found in MODULES.items():
        other = {"compressors": "engines", "engines": "compressors"}.get(layer(module))
        assert other not in {layer(i.target) for i in found}, f"{module} imports {other}, for typing or otherwise"


def test_nothing_imports_the_command_line_or_the_tools() -> None:
    for module, found in MODULES.items():
        targets = {i.target for i in found}
        assert module == "nxm_export.__main__" or "nxm_export.cli" not in targets, module
        assert not {target for target in targets if target.partition(".")[0] in ("tools", "tests")}, module


@pytest.mark.parametrize("file", sorted((ROOT / "tools").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_tools_import_no_tests(file: Path) -> None:
    assert not {found.target for found in imports(file) if found.target.partition(".")[0] == "tests"}


@pytest.mark.parametrize("folder", [*PACKAGES, "tools"])
def test_nothing_is_typed_as_anything(folder: str) -> None:
    """``object``, narrowed where it is read, or a record: `Any` switches the type checker off for all that it meets."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        names = {
            alias.name
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module == "typing"
            for alias in node.names
        }
        assert "Any" not in names, f"{file} imports typing.Any"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {i.target for i in found if i.target in MODULES and i.when != "typing"}
        for module, found in MODULES.items()
    }
    remaining = dict(graph)
    while remaining:
        free = [module for module, needs in remaining.items() if not needs & remaining.keys()]
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {module: needs for module, needs in remaining.items() if module not in free}


def test_the_check_for_circles_sees_lazy_imports_and_submodules(tmp_path: Path) -> None:
    source = """import os.path
from nxm_export.contract import plan
def f():
    import torch
if TYPE_CHECKING:
    import onnx
"""
    file = tmp_path / "sample.py"
    file.write_text(source)
    assert [(i.target, i.when) for i in imports(file)] == [
        ("os.path", "eager"),
        ("nxm_export.contract.plan", "eager"),
        ("torch", "lazy"),
        ("onnx", "typing"),
    ]


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) != "compressors"])
def test_all_but_training_keeps_the_syntax_of_python_3_10(module: str) -> None:
    file = ROOT.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))
