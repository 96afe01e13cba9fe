"""What a command came to stands in its first line; a directory of another kind is named, with what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engines.benchmark.latency import BenchReport, Timing
from nxm_export.cli import main
from nxm_export.cli.first_lines import of_bench, of_compression
from nxm_export.contract.choices import BACKEND_NAMES
from nxm_export.contract.records.checkpoint_metrics import (
    CompressionMetrics,
    DistanceToDense,
    Scores,
    TrainingFacts,
)
from nxm_export.contract.records.speedup import Speedup
from nxm_export.pipeline.environment import missing_for
from tests.support import tiny


def nxm(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def first_line(*arguments: object) -> str:
    return nxm(*arguments).stdout.splitlines()[0]


def test_the_first_line_says_what_it_came_to(
    tiny_checkpoint: Callable[..., Path], tiny_graph: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint, graph = tiny_checkpoint("bert"), tiny_graph("bert", "inputs")
    packed, engine = tmp_path / "packed.safetensors", tmp_path / "engine"
    assert first_line("inspect", checkpoint).startswith("A compressed checkpoint: bert for classification, ")
    assert first_line("inspect", checkpoint.parent / "dense").startswith("A dense model: bert for classification, ")
    assert first_line("inspect", graph).startswith("An ONNX graph: opset 20, ")
    assert first_line("pack", checkpoint, "--out", packed).startswith("Packed: 0.")
    assert first_line("unpack", packed, "--out", tmp_path / "again").startswith("Unpacked, bit by bit the checkpoint")
    assert first_line("build", graph, "--out", engine) == (
        f"Built ort engine {engine}; not compared with its checkpoint yet."
    )
    assert first_line("inspect", engine).startswith("An engine of backend ort, built on ")
    (tmp_path / "run" / "engines").mkdir(parents=True)
    (tmp_path / "run" / "manifest.json").write_text("{}")
    (tmp_path / "run" / "engines" / "int8").symlink_to(engine)
    assert nxm("inspect", tmp_path / "run").stdout.splitlines()[0:4:3] == [
        "1 engine.",
        "int8    ort      12             no sparse kernels",
    ]
    assert first_line("export", checkpoint, "--out", tmp_path / "graph").startswith("Exported for cpu")
    told = first_line("doctor")
    assert told.startswith("Run here: ort")
    runs = told.partition("Run here: ")[2].partition(".")[0].split(", ")
    assert {name for name in BACKEND_NAMES if missing_for(name) is None} == {*runs}, "what only builds is not ready"


def test_what_is_inspected_is_a_screen(
    tiny_checkpoint: Callable[..., Path], tiny_graph: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for path, left_out in ((tiny_checkpoint("bert"), "mask_hash"), (tiny_graph("bert", "inputs"), "nxm.weights")):
        lines = nxm("inspect", path).stdout.splitlines()
        assert len(lines) <= 25
        assert max(map(len, lines)) <= 80
        assert left_out not in " ".join(lines)
        assert left_out in nxm("inspect", path, "--all").stdout


def test_an_engine_without_its_file_is_refused_with_what_to_do(
    tiny_engine: Callable[..., Path], tmp_path: Path
) -> None:
    engine = shutil.copytree(tiny_engine("ort", "bert", "inputs"), tmp_path / "engine")
    (engine / "model.onnx").unlink()
    for arguments in (("predict", engine, "a film"), ("bench", engine), ("inspect", engine)):
        assert nxm(*arguments, code=1).stderr.splitlines()[-1] == (
            f"nxm: {engine / 'model.onnx'} is missing: the passport beside it names it; restore it, or build again"
        )


def test_a_directory_of_another_kind_is_named_with_what_to_do(
    tiny_checkpoint: Callable[..., Path], tiny_graph: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint, graph = tiny_checkpoint("bert"), tiny_graph("bert", "inputs")
    for command in ("build", "verify"):
        out = ["--out", tmp_path / "out"] if command == "build" else []
        told = nxm(command, checkpoint, *out, code=1).stderr
        assert f"it is a model: `nxm export {checkpoint} --out GRAPH` makes its graph" in told
    run = tmp_path / "run"
    (run / "onnx").mkdir(parents=True)
    (run / "onnx" / "cpu").symlink_to(graph)
    assert f"it is a run: give one of its graphs, {run / 'onnx' / 'cpu'}" in nxm("verify", run, code=1).stderr
    told = nxm("card", graph, "--out", tmp_path / "card.md", code=1).stderr
    assert "neither a run, a compressed checkpoint nor an engine directory" in told


@pytest.mark.parametrize(
    ("intervals", "word"),
    [
        ([(1.2, 1.4), (1.01, 1.1)], "faster"),
        ([(0.8, 0.9)], "slower"),
        ([(0.9, 1.1)], "no difference found"),
        ([(1.2, 1.4), (0.9, 1.1)], "faster at some shapes"),
        ([(0.7, 0.8), (0.9, 1.1)], "slower at some shapes"),
        ([(1.2, 1.4), (0.8, 0.9), (0.9, 1.1)], "faster or slower, by shape"),
    ],
)
def test_a_speed_is_called_what_its_intervals_show(intervals: list[tuple[float, float]], word: str) -> None:
    timing = Timing("a", 1, 32, 2.0, (1.9, 2.1), 30)
    ratios = tuple(Speedup("b", "a", 1, at + 1, 1.0, interval) for at, interval in enumerate(intervals))
    assert of_bench(BenchReport((timing,), ratios)) == f"Against a: b: {word}."


@pytest.mark.parametrize(
    ("to_dense", "said"),
    [
        (DistanceToDense(), ""),
        (
            DistanceToDense(dense_value=0.75, distance_to_dense=0.0125, distance_measure="kl", same_answers=0.9),
            "\nDense: accuracy 0.7500; 90.00% of the answers are the same, KL(dense || compressed) 0.0125 nats.",
        ),
        (
            DistanceToDense(dense_value=0.75, distance_to_dense=0.5, distance_measure="squared-error"),
            "\nDense: accuracy 0.7500; mean squared difference 0.5000.",
        ),
        (
            DistanceToDense(dense_value=0.75, distance_to_dense=None, distance_measure="relative-squared-distance"),
            "\nDense: accuracy 0.7500; mean squared distance NaN of the squared length.",
        ),
    ],
)
def test_a_compression_says_how_far_it_is_from_the_dense_model(to_dense: DistanceToDense, said: str) -> None:
    scores = Scores(metric="accuracy", value=0.5, interval=None, dev_samples=8)
    facts = TrainingFacts(recipe="admm", steps=0, train_samples=8, held_out_samples=0, qat_steps=0, mask_hash="ab")
    metrics = CompressionMetrics.of(
        scores, facts, to_dense, embedding_table_drop=None, embedding_table_drop_interval=None
    )
    assert of_compression(metrics) == f"Compressed: accuracy 0.5000 (no interval) on 8 samples.{said}"


def test_without_dev_the_first_line_has_the_distance_alone(tmp_path: Path) -> None:
    dense = tiny.write_model("bert", tmp_path / "dense", head="classification", layers=1)
    train, _ = tiny.write_data(tmp_path, "classification")
    command = ("compress", dense, "--train", train, "--out", tmp_path / "out")
    line = first_line(*command, "--steps", 0)
    assert re.fullmatch(
        r"Compressed: [\d.]+% of the answers are the same, KL\(dense \|\| compressed\) [\d.e-]+ nats on \d+ texts "
        r"without labels, so there is no score\.",
        line,
    )
    assert first_line("inspect", tmp_path / "out").startswith("A compressed checkpoint: ")
    said = nxm(*command, code=2).stderr
    assert "only --steps 0 and --recipe one-shot do without --dev" in said
