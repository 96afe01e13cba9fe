"""The functions and objects of `import nxm_export as nxm` do what they say, on a small model, and refuse the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import nxm_export as nxm
from nxm_export.cli import main
from tests.support import baked, tiny


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
