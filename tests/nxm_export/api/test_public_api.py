"""`import nxm_export as nxm`: what is public, that it costs nothing to import, and that it does what it says."""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import nxm_export as nxm
from compressors.settings import Settings
from nxm_export.cli import main
from nxm_export.contract.options import options_of
from tests.conftest import ROOT
from tests.support import baked, tiny

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


def test_a_search_takes_as_many_samples_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "compressors.search.plan_search.search", lambda model, **given: asked.append(given["train_limit"])
    )
    nxm.search("dense", train="train.tsv", out=tmp_path, train_limit=7)
    nxm.Model("dense", "classification").search("train.tsv", out=tmp_path, train_limit=8)
    assert asked == [7, 8]


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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a compressed checkpoint, its graph and its engine, and the data; read it only."""
    home = tmp_path_factory.mktemp("small")
    tiny.write_data(home)
    baked.write_checkpoint("bert", home / "checkpoint")
    nxm.export(home / "checkpoint", home / "graph")
    nxm.build(home / "graph", home / "engine")
    return home


def test_objects_take_a_model_all_the_way(tmp_path: Path) -> None:
    train, dev = tiny.write_data(tmp_path)
    tiny.write_model("bert", tmp_path / "model", head="classification", layers=1)
    model = nxm.load(tmp_path / "model", task="classification")
    settings = nxm.Settings(steps=4, calibration_samples=64, batch_size=16)
    compressed = model.compress(train, dev=dev, out=tmp_path / "small", settings=settings)
    assert compressed.metrics.recipe == "admm"
    assert compressed.plan.pattern_counts == {"2:4+W8": 6}
    graph = compressed.export(tmp_path / "graph")
    assert graph.verify().passed
    engine = graph.build(tmp_path / "engine", backend="auto")
    comparison = engine.compare(dev)
    comparison.require()
    (prediction,) = engine.predict(["a good film"])
    assert isinstance(prediction, nxm.Prediction)
    assert prediction.label in ("0", "1")
    assert [timing.batch for timing in engine.bench([(1, 8)], rounds=2).timings] == [1]
    assert compressed.pack(tmp_path / "small.safetensors").is_file()


def test_compare_uses_the_recorded_checkpoint_and_says_when_it_is_gone(small: Path, tmp_path: Path) -> None:
    nxm.compare(small / "engine", small / "dev.tsv").require()
    shutil.copytree(small / "engine", tmp_path / "engine")
    (tmp_path / "engine" / "origin.json").unlink()
    with pytest.raises(nxm.ArtifactError, match="does not record the checkpoint"):
        nxm.compare(tmp_path / "engine", small / "dev.tsv")
    nxm.compare(tmp_path / "engine", small / "dev.tsv", checkpoint=small / "checkpoint").require()
    moved = {"schema": "nxm-origin/1", "checkpoint": str(tmp_path / "gone")}
    (tmp_path / "engine" / "origin.json").write_text(json.dumps(moved))
    with pytest.raises(nxm.ArtifactError, match=r"gone, which is not there \(any more\); name the checkpoint"):
        nxm.compare(tmp_path / "engine", small / "dev.tsv")


def test_a_wrong_reference_is_refused(small: Path, tmp_path: Path) -> None:
    other = baked.write_checkpoint("bert", tmp_path / "other", seed=1)
    with pytest.raises(nxm.ArtifactError, match="was built from other weights"):
        nxm.compare(small / "engine", small / "dev.tsv", checkpoint=other)
    with pytest.raises(nxm.ArtifactError, match=r"engine has no config\.json: not a Hugging Face model directory"):
        nxm.compare(small / "engine", small / "dev.tsv", checkpoint=small / "engine")


def test_the_task_of_an_engine_is_checked(small: Path) -> None:
    assert nxm.open_engine(small / "engine", task="classification").passport.backend == "ort"
    with pytest.raises(nxm.ArtifactError, match="is an engine for classification, not for embedding"):
        nxm.open_engine(small / "engine", task="embedding")


def test_a_model_knows_its_task_from_its_head(small: Path, tmp_path: Path) -> None:
    assert nxm.load(small / "checkpoint").task == "classification"
    encoder = tiny.write_model("bert", tmp_path / "encoder")
    with pytest.raises(nxm.DataError, match="give one, as in task='classification'"):
        nxm.load(encoder)
    with pytest.raises(nxm.PlanError, match="unknown task 'summarisation'"):
        nxm.load(encoder, task="summarisation")


def test_options_of_auto_are_refused_elsewhere(small: Path, tmp_path: Path) -> None:
    with pytest.raises(nxm.EngineError, match="are for backend='auto'"):
        nxm.build(small / "graph", tmp_path / "engine", data=small / "dev.tsv")
    with pytest.raises(nxm.EngineError, match="give data, or leave the checkpoint out"):  # it would not be compared
        nxm.build(small / "graph", tmp_path / "engine", backend="auto", checkpoint=small / "checkpoint")
    options = nxm.BuildOptions(level=3, timing_cache=tmp_path / "cache")
    with pytest.raises(nxm.EngineError, match="ort has no use for level, timing_cache"):
        nxm.build(small / "graph", tmp_path / "engine", options=options)


def test_a_directory_without_a_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(nxm.ArtifactError, match=r"has no model\.onnx"):
        nxm.verify(tmp_path)


def test_an_engine_directory_is_no_graph(small: Path, tmp_path: Path) -> None:
    with pytest.raises(nxm.ArtifactError, match="is an engine directory; give the graph"):
        nxm.build(small / "engine", tmp_path / "engine")


def test_a_graph_directory_stands_for_its_file_everywhere(small: Path, tmp_path: Path) -> None:
    graph = small / "graph"
    assert nxm.verify(graph) == nxm.verify(graph / "model.onnx")
    assert nxm.inspect(graph).to_dict() == nxm.inspect(graph / "model.onnx").to_dict()
    assert nxm.diagnose(graph) == nxm.diagnose(graph / "model.onnx")
    commands = (["verify"], ["inspect"], ["doctor"], ["build", "--out", str(tmp_path / "engine")])
    for name, *options in commands:
        results = [
            CliRunner().invoke(main, [name, str(path), *options, "--json"]) for path in (graph, graph / "model.onnx")
        ]
        assert [result.exit_code for result in results] == [0, 0], f"{name}: {results[0].output}"
        if name != "build":  # a passport has a time
            assert results[0].stdout == results[1].stdout, name


def compressed(tmp_path: Path, **choices: Any) -> None:
    """What `compress` reports about its choices, before it looks for the model."""
    nxm.compress(tmp_path / "none", train="a", dev="b", out=tmp_path / "c", **choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"weight_bits": None, "options": nxm.PlanOptions(residual="int8")},
            "residual int8: activations are quantized",
        ),
        (
            {"weight_bits": None, "options": nxm.PlanOptions(placement="attention", residual="int8")},
            "placement attention and residual int8",
        ),
        ({"plan": "p.json", "pattern": "2:4"}, "so pattern would be dropped"),
        ({"plan": "p.json", "weight_bits": 8}, "so weight_bits would be dropped"),
        (
            {"plan": "p.json", "pattern": None, "options": nxm.PlanOptions(embedding="int8")},
            "so pattern, options would",
        ),
    ],
)
def test_what_was_asked_is_never_dropped(tmp_path: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(nxm.PlanError, match=message):
        compressed(tmp_path, **choices)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"pattern": nxm.NMPattern(1, 4)},
        {"pattern": None},
        {"weight_bits": None},
        {"weight_bits": None, "options": nxm.PlanOptions(placement="inputs")},
        {"plan": "p.json"},
        {"options": nxm.PlanOptions(placement="attention", residual="int8")},
    ],
)
def test_what_goes_together_gets_as_far_as_the_model(tmp_path: Path, choices: dict[str, Any]) -> None:
    with pytest.raises(nxm.ArtifactError, match="none: no such directory"):
        compressed(tmp_path, **choices)


def test_one_glob_without_a_tuple_is_refused() -> None:
    with pytest.raises(nxm.PlanError, match=r"write \('\*x\*',\)"):
        nxm.PlanOptions(keep_dense="*x*")  # type: ignore[arg-type]


def test_no_threads_are_refused(small: Path) -> None:
    with pytest.raises(nxm.DataError, match="at least one thread, got 0"):
        nxm.predict(small / "engine", ["a"], threads=0)
    with pytest.raises(nxm.EngineError, match="at least one thread, got 0"):
        nxm.bench(small / "engine", [(1, 8)], threads=0)
    with pytest.raises(nxm.EngineError, match="at least one thread, got 0"):
        nxm.bench_text(small / "engine", small / "dev.tsv", threads=0)


def test_nothing_of_a_thing_is_refused_and_no_default(small: Path, tmp_path: Path) -> None:
    for batch, rounds in ((0, 1), (1, 0)):
        with pytest.raises(nxm.EngineError, match="at least one engine, one sentence"):
            nxm.bench_text(small / "engine", small / "dev.tsv", threads=1, batch=batch, rounds=rounds)
    with pytest.raises(nxm.DataError, match="at least 1, got 0"):
        nxm.estimate("m", train="t", dev="d", train_limit=0)
    train, dev = tiny.write_data(tmp_path)
    encoder = tiny.write_model("bert", tmp_path / "encoder", layers=1)
    with pytest.raises(nxm.DataError, match="at least 1; got 0"):
        nxm.finetune(encoder, train=train, dev=dev, out=tmp_path / "dense", train_limit=0)


def test_only_an_expected_engine_predicts(tiny_engine: Callable[..., Path]) -> None:
    engine = nxm.open_engine(tiny_engine("ort"))
    assert engine.predict(["a film"], expect_sha256=[engine.passport.engine_sha256])
    with pytest.raises(nxm.ServeError, match="expect"):
        engine.predict(["a film"], expect_sha256=["0" * 64])


def test_a_backend_without_sparse_kernels_is_judged_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(nxm.EngineError, match=r"'ort' runs no sparse kernels.*choose one of trt, trt_rtx"):
        nxm.diagnose(tmp_path / "model.onnx", backend="ort")


def test_a_search_refuses_the_revision_that_it_cannot_take(tmp_path: Path) -> None:
    model = nxm.load("owner/name", task="classification", revision="main")
    with pytest.raises(nxm.ArtifactError, match="a search takes no revision"):
        model.search("a", out=tmp_path)


def test_a_path_that_is_no_model_directory_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(nxm.ArtifactError, match="is a file; give the directory"):
        nxm.load(file, task="classification")
    for missing in (tmp_path / "gone", Path("gone"), "./gone", "~/gone", "a/b/c", f"{tmp_path}/gone"):
        with pytest.raises(nxm.ArtifactError, match="no such directory; give the directory"):
            nxm.load(missing, task="classification")
    for name in ("bert-base-uncased", "owner/name"):
        assert nxm.load(name, task="classification").source == name


def test_finetune_makes_the_dense_model(tmp_path: Path) -> None:
    train, dev = tiny.write_data(tmp_path)
    encoder = tiny.write_model("bert", tmp_path / "encoder", layers=1)
    settings = nxm.Settings(dense_steps=2, batch_size=16)
    metrics = nxm.finetune(encoder, train=train, dev=dev, out=tmp_path / "dense", settings=settings)
    assert isinstance(metrics, nxm.DenseMetrics)
    assert metrics.steps == 2
    assert nxm.load(tmp_path / "dense").task == "classification"


def test_nothing_to_compress_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(nxm.PlanError, match="nothing to compress"):
        nxm.compress(tmp_path, train="a", dev="b", out=tmp_path / "c", pattern=None, weight_bits=None)


# What `nxm run` asks for where Python has another place for it, or none.
OF_RUN = {
    **dict.fromkeys(("placement", "residual", "embedding", "keep_dense"), "options"),
    **dict.fromkeys(("text", "text_pair", "label", "label_map"), "columns"),
    **{name: "settings" for name, _ in options_of(Settings)},
    "plan_file": "plan",
    "more_text_share": "more_text",
    "dry_run": None,  # `estimate`, below
    **dict.fromkeys(("demo", "config", "json"), None),  # for a terminal alone
}


@pytest.mark.parametrize("function", [nxm.run, nxm.estimate])
def test_every_option_of_a_run_has_its_parameter_in_python(function: Callable[..., object]) -> None:
    parameters = {str(parameter.name) for parameter in main.commands["run"].params} - {"help_all"}
    assert OF_RUN.keys() <= parameters, "an exception that is none"
    wanted = {OF_RUN.get(name, name) for name in parameters} - {None}
    beside = {"progress"} if function is nxm.run else set()
    without = {"out"} if function is nxm.estimate else set()  # it writes nothing
    assert set(inspect.signature(function).parameters) == {*wanted, *beside} - without


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plan": "p.json", "search": 0.8}, "so plan would be dropped"),
        ({"plan": "p.json", "pattern": "2:4"}, "so pattern would be dropped"),
        ({"search": 0.8, "weight_bits": 4}, "so weight_bits would be dropped"),
        ({"search": 0.8, "options": nxm.PlanOptions(residual="int8")}, "so options would be dropped"),
        ({"search": nxm.SearchSettings(), "options": nxm.PlanOptions(embedding="int8")}, "so options would be dropped"),
        ({"search": 1}, "a share between 0 and 1, as in 0.875; got 1"),
        ({"search": True}, "such as 0.875, or a SearchSettings; got True"),
        ({"search": "0.9"}, "such as 0.875, or a SearchSettings; got '0.9'"),
    ],
    ids=str,
)
def test_a_run_in_python_is_told_one_plan(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(nxm.PlanError, match=message):
        nxm.run("m", train="t", dev="d", out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_run_in_python_takes_plan_search_and_backends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the pipeline gets is what the command gives it."""
    from nxm_export.pipeline.plan_choice import PlanChoice
    from nxm_export.pipeline.run import Request

    got: list[tuple[Request, PlanChoice]] = []
    monkeypatch.setattr(
        "nxm_export.pipeline.run.run", lambda request, out, choice, progress: got.append((request, choice))
    )
    nxm.run("m", train="t", dev="d", out=tmp_path, plan="p.json", backend="auto")
    options = nxm.PlanOptions(embedding="int8", placement="attention")
    nxm.run("m", train="t", dev="d", out=tmp_path, search=0.9, options=options, backend=["ort", "openvino"])
    common = ["run", "m", "--train=t", "--dev=d", f"--out={tmp_path}"]
    for more in (
        ["--plan=p.json", "--backend=auto"],
        ["--search=0.9", "--embedding=int8", "--placement=attention", "--backend=ort,openvino"],
    ):
        CliRunner().invoke(main, [*common, *more])
    assert [choice.search and choice.search.compression for _, choice in got] == [None, 0.9, None, 0.9]
    for ours, theirs in zip(got[:2], got[2:], strict=True):
        assert str(ours[1].file) == str(theirs[1].file)
        assert ours[1].search == theirs[1].search
        assert replace(ours[0], spec=theirs[0].spec) == theirs[0]
