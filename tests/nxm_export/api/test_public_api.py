"""`import nxm_export as nxm`: what is public, and that it costs nothing to import."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nxm_export as nxm
from tests.conftest import ROOT

PUBLIC = [name for name in nxm.__all__ if name != "__version__"]
ALIASES = {"Progress", "Text", "AnyPrediction"}  # of types of Python or of ours, which have their own docstrings


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_for_types() -> dict[str, str]:
    """Name -> module of the imports under TYPE_CHECKING: what a type checker takes the public names to be."""
    tree = ast.parse((ROOT / "nxm_export" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    return {
        alias.name: node.module or "" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_every_public_name_is_there_with_a_docstring() -> None:
    assert len(set(nxm.__all__)) == len(nxm.__all__)
    for name in set(PUBLIC) - ALIASES:
        assert getattr(nxm, name).__doc__, f"nxm.{name} has no docstring"
    assert set(nxm.__all__) <= set(dir(nxm))


def test_a_type_checker_sees_the_names_that_there_are() -> None:
    imports = imported_for_types()
    assert set(imports) == set(PUBLIC)
    for name, module in imports.items():
        assert nxm._HOMES[name] == module, f"{name} comes from two modules"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        nxm.prune  # type: ignore[attr-defined]  # noqa: B018


# Names in signatures that are no types to know: the type variable of results, and a module.
NO_TYPES = {"P_co", "functions"}
# Methods of public classes that stay inside: backends issue passports, and read what else of an engine they cover;
# training makes metrics.
INSIDE = {
    ("EnginePassport", "issue"),
    ("EnginePassport", "tensors"),
    ("DenseMetrics", "of"),
    ("CompressionMetrics", "of"),
}


def module_tree(module: str) -> ast.Module:
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    file = file if file.is_file() else file.with_suffix("") / "__init__.py"
    return ast.parse(file.read_text(encoding="utf-8"))


def own_names(tree: ast.Module) -> set[str]:
    """What a module's annotations may name of this project: what it imports from it, its classes and its aliases."""
    imported = [
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and str(node.module).split(".")[0] in ("nxm_export", "compressors", "engines")
        for alias in node.names
    ]
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assigned = [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    return {*imported, *classes, *assigned}


def annotated_names(function: ast.FunctionDef, own: set[str]) -> set[str]:
    """Those of a module's `own` names that a signature names, and attributes of them."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [function.returns, *(argument.annotation for argument in every if argument is not None)]
    nodes = [node for annotation in annotations if annotation is not None for node in ast.walk(annotation)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) in own]
    return {node.id for node in nodes if isinstance(node, ast.Name)} & own | {node.attr for node in attributes}


def public_functions(name: str, tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """The function of this name (with its overloads), or the methods of the class that others may call."""
    made: list[tuple[str, ast.FunctionDef]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            made.append((name, node))
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            callable_ = [child for child in methods if not child.name.startswith("_") or child.name.startswith("__")]
            made += [(f"{name}.{child.name}", child) for child in callable_ if (name, child.name) not in INSIDE]
    return made


@pytest.mark.parametrize("name", PUBLIC)
def test_every_type_of_ours_in_a_public_signature_is_public(name: str) -> None:
    tree = module_tree(nxm._HOMES[name])
    for where, function in public_functions(name, tree):
        assert annotated_names(function, own_names(tree)) - NO_TYPES <= set(PUBLIC), where


@pytest.mark.parametrize(
    "name",
    [
        "PlanOptions",
        "Settings",
        "SearchSettings",
        "BuildOptions",
        "Profile",
        "ModelOptions",
        "ServerOptions",
        "TritonOptions",
        "Columns",
    ],
)
def test_what_an_option_takes_is_public(name: str) -> None:
    tree = module_tree(nxm._HOMES[name])
    (record,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    annotations = [node.annotation for node in record.body if isinstance(node, ast.AnnAssign)]
    named = {node.id for top in annotations for node in ast.walk(top) if isinstance(node, ast.Name)}
    assert named & own_names(tree) <= set(PUBLIC)


def table_rows() -> list[str]:
    """The functions in the table of docs/python.md."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("| function | command | returns |")[2]
    return [
        name
        for row in page.partition("\n\n")[0].splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]


def test_the_table_of_functions_has_all_of_them() -> None:
    trees = [module_tree(f"nxm_export.api.{module}") for module in ("functions", "engine_functions")]
    functions = {
        node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in PUBLIC
    }
    assert len(table_rows()) == len(set(table_rows()))
    assert set(table_rows()) == functions


@pytest.mark.parametrize("name", table_rows())
def test_what_a_function_returns_has_a_record(name: str) -> None:
    """`to_dict`, but for what is a path, a list of results, or nothing."""
    ((_, function),) = public_functions(name, module_tree(nxm._HOMES[name]))
    assert function.returns is not None
    returned = ast.unparse(function.returns)
    plain = {"Path": "unpack report card", "list[AnyPrediction]": "predict", "None": "serve"}
    assert (returned in plain) == (name in " ".join(plain.values()).split())
    if returned in plain:
        assert name in plain[returned].split()
        return
    for kind in returned.split(" | "):
        assert callable(getattr(getattr(nxm, kind), "to_dict", None)), f"{name} returns {kind}"


def test_importing_loads_nothing_and_no_submodule_changes_a_public_name() -> None:
    code = f"""
import sys
import nxm_export as nxm
heavy = {{"numpy", "torch", "transformers", "onnx", "onnxruntime", "click"}}
assert not heavy & set(sys.modules), "the import is instant"
before = {{name: getattr(nxm, name) for name in {nxm.__all__!r}}}
import importlib, pkgutil
for found in pkgutil.walk_packages(nxm.__path__, "nxm_export."):
    if found.name != "nxm_export.__main__":
        importlib.import_module(found.name)
changed = [name for name, value in before.items() if getattr(nxm, name) is not value]
assert not changed, changed
"""
    python(code)


def test_no_public_name_is_a_submodule() -> None:
    submodules = {found.name for found in pkgutil.iter_modules(nxm.__path__)}
    assert not submodules & set(nxm.__all__)


def test_predicting_loads_neither_torch_nor_transformers(tiny_engine: Callable[..., Path]) -> None:
    code = f"""
import sys
import nxm_export as nxm
print(nxm.open_engine({str(tiny_engine())!r}).predict(["a good film"])[0].label)
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    assert python(code).strip() in ("0", "1")
