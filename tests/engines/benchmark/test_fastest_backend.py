"""``nxm build --backend auto`` keeps the fastest engine by measurement, says why, and keeps nothing that fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from click.testing import CliRunner

from engines.base import BuildOptions, Closing, Engine, backend, cpu_backends
from engines.benchmark.fastest_backend import Choice, choose, judge
from engines.benchmark.latency import BenchReport, Timing, bench
from engines.openvino.backend import OpenVinoEngine
from engines.passport import load_passport
from nxm_export.cli import main
from nxm_export.contract.records.speedup import Speedup
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.pipeline.engine_builds import ParityCheck, build_fastest
from nxm_export.storage.json_files import as_object, as_objects, entry_at
from tests.support import onnx_text

pytest.importorskip("openvino", reason="OpenVINO is not installed; pip install 'nxm-export[openvino]'")


class Paced:
    """An engine whose every run takes as long as it is told, by its own clock: `engines.benchmark.latency` does the
    rest."""

    clock = "told"

    def __init__(self, engine: Engine, milliseconds: Sequence[float]) -> None:
        self.inputs, self.outputs, self._told = engine.inputs, engine.outputs, milliseconds
        self.input_bindings = engine.input_bindings

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        number = -1

        def once() -> float:
            nonlocal number
            number += 1
            return self._told[number % len(self._told)]

        return once


def told(**milliseconds: Sequence[float]) -> Callable[..., BenchReport]:
    """A measurement in which every backend takes the milliseconds that it is told, in turn."""

    def measure(engines: Mapping[str, Engine], shapes: Sequence[tuple[int, int]]) -> BenchReport:
        return bench({name: Paced(engine, milliseconds[name]) for name, engine in engines.items()}, shapes, rounds=40)  # type: ignore[misc]

    return measure


@pytest.fixture(scope="module")
def graph(tiny_graph: Callable[..., Path]) -> Path:
    return tiny_graph("bert", "inputs") / "model.onnx"


@pytest.fixture
def compared_choice(
    tiny_graph: Callable[..., Path], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> Callable[[], Choice]:
    """Builds an engine of which OpenVINO's is the faster one, and compares both with their checkpoint."""

    def choice() -> Choice:
        checkpoint = tiny_checkpoint("bert")
        return build_fastest(
            tiny_graph("bert", "inputs-outputs") / "model.onnx",
            tmp_path / "engine",
            shapes=[(1, 4)],
            check=ParityCheck(checkpoint, str(checkpoint.parent / "dev.tsv")),
            measure=told(ort=[2.0], openvino=[1.0]),
        ).choice

    return choice


@pytest.mark.parametrize(
    ("ort", "openvino", "kept", "why"),
    [
        ([2.0], [1.0], "openvino", "openvino is 2.00x as fast as ort over these shapes"),
        ([1.0], [2.0], "ort", "openvino is slower: 0.50x as fast as ort"),
        ([1.0, 3.0, 1.0], [1.1, 0.9, 1.0], "ort", "a tie: openvino is .* which is within noise, and ort comes first"),
    ],
    ids=["openvino faster", "ort faster", "noise"],
)
def test_the_fastest_beyond_noise_is_kept_and_the_passport_says_why(
    ort: list[float], openvino: list[float], kept: str, why: str, graph: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engine"
    built = build_fastest(graph, out, shapes=[(1, 4), (2, 6)], measure=told(ort=ort, openvino=openvino))
    passport = load_passport(out)
    assert built.choice.backend == passport.backend == built.passport.backend == kept
    recorded = as_object(passport.options["auto"])
    assert re.search(why, str(recorded["why"]))
    assert recorded["shapes"] == [[1, 4], [2, 6]]
    assert [row["backend"] for row in as_objects(recorded["candidates"])] == ["ort", "openvino"]
    assert recorded["parity"] == "not checked"
    assert {path.name for path in out.iterdir()} == {
        *("model.onnx", "passport.json", "spec.json", "tokenizer.json", "origin.json")
    }


@pytest.mark.parametrize(
    ("second", "third", "kept", "why"),
    [
        ((1.5, 0.9, 2.5), (1.3, 1.2, 1.4), "third", "third is 1.30x as fast as first over these shapes (1.20 to 1.40)"),
        ((1.5, 1.4, 1.6), (1.3, 1.2, 1.4), "second", "second is 1.50x as fast as first"),
        ((1.5, 1.0, 2.5), (1.2, 0.9, 1.4), "first", "a tie: second is 1.50x as fast as first (1.00 to 2.50)"),
        ((0.5, 0.4, 0.6), (0.8, 0.7, 0.9), "first", "third is slower: 0.80x as fast as first (0.70 to 0.90)"),
        ((0.5, 0.4, 0.6), (0.8, 0.7, 1.0), "first", "a tie: third is 0.80x as fast as first (0.70 to 1.00)"),
    ],
)
def test_of_those_that_are_proven_faster_the_fastest_is_kept(
    second: tuple[float, float, float], third: tuple[float, float, float], kept: str, why: str
) -> None:
    timings = tuple(Timing(name, 1, 8, 2.0, (1.9, 2.1), 30) for name in ("first", "second", "third"))
    ratios = tuple(
        Speedup(name, "first", 1, 8, speedup, (low, high))
        for name, (speedup, low, high) in (("second", second), ("third", third))
    )
    choice = judge(BenchReport(timings, ratios), [(1, 8)], {"fourth": "no GPU"})
    assert choice.backend == kept
    assert choice.why.startswith(why)
    assert [one.backend for one in choice.candidates] == ["first", "second", "third"]
    assert [one.speedup for one in choice.candidates] == pytest.approx([1.0, second[0], third[0]])
    alone = judge(BenchReport(timings[:1], ()), [(1, 8)], {"fourth": "no GPU"})
    assert (alone.backend, alone.why) == ("first", "first is the only candidate (fourth: no GPU)")


def test_an_engine_whose_outputs_are_no_numbers_at_one_shape_is_no_candidate(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = OpenVinoEngine.run

    def overflowing(engine: OpenVinoEngine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = healthy(engine, feeds)
        return {name: array * np.nan if len(array) == 2 else array for name, array in outputs.items()}

    monkeypatch.setattr(OpenVinoEngine, "run", overflowing)
    measure = told(ort=[2.0], openvino=[1.0])
    choice = build_fastest(graph, tmp_path / "engine", shapes=[(1, 4), (2, 6)], measure=measure).choice
    assert (choice.backend, choice.left_out) == ("ort", {"openvino": "its outputs are not finite"})


def test_the_mix_of_shapes_decides(graph: Path, tmp_path: Path) -> None:
    """openvino is 4 times as fast at one token and half as fast at five; a shape that is given often counts often."""

    def measure(engines: Mapping[str, Engine], shapes: Sequence[tuple[int, int]]) -> BenchReport:
        speed = {(1, 1): (4.0, 1.0), (1, 5): (1.0, 2.0)}
        reports = [told(ort=[speed[s][0]], openvino=[speed[s][1]])(engines, [s]) for s in dict.fromkeys(shapes)]
        return BenchReport(
            tuple(timing for report in reports for timing in report.timings),
            tuple(ratio for report in reports for ratio in report.ratios),
        )

    for shapes, kept in (([(1, 1), (1, 5)], "openvino"), ([(1, 1), *[(1, 5)] * 4], "ort")):
        choice = build_fastest(graph, tmp_path / kept, shapes=shapes, measure=measure).choice
        assert choice.backend == kept


def test_an_engine_that_fails_the_comparison_is_no_candidate(
    compared_choice: Callable[[], Choice],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenVINO is told to be the fastest, and a scale in its file is doubled: the slower engine is kept."""
    from engines.openvino import backend as openvino
    from nxm_export.graph.reading.graph_weights import load_graph, save_graph
    from nxm_export.storage.hashing import file_hash
    from tests.support.broken import scale_doubled

    healthy = openvino.build

    def broken(onnx: Path, out: Path, options: Any) -> Any:
        healthy(onnx, out, options)
        model = load_graph(out / "model.onnx")
        scale_doubled(model)
        save_graph(model, out / "model.onnx")
        facts = json.loads((out / "passport.json").read_text())
        facts["engine_sha256"] = file_hash(out / "model.onnx")
        (out / "passport.json").write_text(json.dumps(facts))
        return load_passport(out)

    monkeypatch.setattr(openvino, "build", broken)
    choice = compared_choice()
    assert choice.backend == "ort"
    assert choice.left_out == {"openvino": "it does not compute what the checkpoint computes"}
    assert "only candidate" in choice.why
    assert entry_at(load_passport(tmp_path / "engine").options, "auto", "parity") == "passed"
    assert json.loads((tmp_path / "engine" / "parity.json").read_text())["passed"] is True


def test_an_engine_that_was_not_compared_is_no_candidate(
    compared_choice: Callable[[], Choice],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenVINO is told to be the fastest, and is not there for the comparison: its passport would say "passed"."""
    from engines.openvino import backend as openvino

    healthy, calls = openvino.load, 0

    def absent(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise EngineUnavailable("gone for a moment")
        return healthy(*arguments)

    monkeypatch.setattr(openvino, "load", absent)
    choice = compared_choice()
    assert choice.backend == "ort"
    assert choice.left_out == {"openvino": "it could not be compared: gone for a moment"}


def test_an_engine_that_fails_while_it_is_compared_is_no_candidate(
    compared_choice: Callable[[], Choice],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(engine: OpenVinoEngine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise EngineError("out of memory")

    monkeypatch.setattr(OpenVinoEngine, "run", failing)
    choice = compared_choice()
    assert choice.backend == "ort"
    assert choice.left_out == {"openvino": "it could not be compared: out of memory"}


@pytest.mark.parametrize("error", [EngineError("out of memory"), EngineUnavailable("no GPU")])
def test_an_engine_that_cannot_be_loaded_is_no_candidate(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: EngineError
) -> None:
    from engines.openvino import backend as openvino

    monkeypatch.setattr(openvino, "load", MagicMock(side_effect=error))
    choice = build_fastest(graph, tmp_path / "engine", shapes=[(1, 4)], measure=told(ort=[1.0])).choice
    assert (choice.backend, choice.left_out) == ("ort", {"openvino": str(error)})


def test_of_two_engines_on_a_gpu_one_may_launch_its_kernels_one_by_one(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nxm bench` does not compare such two by their kernels; which answers sooner can be measured all the same."""
    engines = {}
    for name in ("ort", "openvino"):
        engines[name] = tmp_path / name
        engines[name].mkdir()
        backend(name).build(graph, engines[name], BuildOptions())
        module = backend(name)
        monkeypatch.setattr(module, "load", lambda *given, load=module.load, n=name: OnGpu(load(*given), n == "ort"))
    choice = choose(engines, {}, [(1, 4)])
    assert [one.backend for one in choice.candidates] == ["ort", "openvino"]


class OnGpu(Closing):
    """An engine that says that it is on a GPU, with a clock that does not count the launches of its kernels."""

    clock = "CUDA events"

    def __init__(self, engine: Engine, graph: bool) -> None:
        self._engine, self._graph = engine, graph
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._engine.run(feeds)

    def queue_timer(self, feeds: Mapping[str, np.ndarray], runs: int) -> Callable[[], float]:
        return lambda: float(runs)

    def launches_graph(self, feeds: Mapping[str, np.ndarray]) -> bool:
        return self._graph


def test_a_backend_that_is_missing_is_left_out_with_what_to_install(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    choice = build_fastest(graph, tmp_path / "engine", shapes=[(1, 4)], measure=told(ort=[1.0])).choice
    assert choice.backend == "ort"
    assert "pip install 'nxm-export[openvino]'" in choice.left_out["openvino"]


def test_a_graph_that_nobody_takes_gives_an_error_and_no_directory(tmp_path: Path) -> None:
    text = "g (float[b, 4] x) => (float[b, 4] y) { y = NoSuchOperator(x) }"
    with pytest.raises(EngineError, match="NoSuchOperator"):
        build_fastest(onnx_text.save(text, tmp_path / "broken.onnx"), tmp_path / "engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx"]


def test_a_shape_that_the_model_does_not_take_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="longer than the model's"):
        build_fastest(graph, tmp_path / "engine", shapes=[(1, 5000)])
    assert not (tmp_path / "engine").exists()


def test_the_command_prints_the_candidates_and_writes_one_engine(graph: Path, tmp_path: Path) -> None:
    arguments = ["build", str(graph), "--backend", "auto", "--shape", "1x4", "--threads", "1", "--out"]
    shown = CliRunner().invoke(main, [*arguments, str(tmp_path / "one")])
    assert shown.exit_code == 0, shown.output
    assert "1x4, ms" in shown.stdout
    assert f"kept {load_passport(tmp_path / 'one').backend}" in shown.stdout
    machine = CliRunner().invoke(main, [*arguments, str(tmp_path / "two"), "--json"])
    assert json.loads(machine.stdout)["options"]["auto"]["shapes"] == [[1, 4]]


def test_shapes_that_are_timed_are_compiled_by_the_backend_that_can(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def build(onnx: Path, out: Path, options: BuildOptions) -> None:
        asked[out.name] = options.shapes
        raise EngineError("not here")

    for name in cpu_backends():
        monkeypatch.setattr(backend(name), "build", build)
    with pytest.raises(EngineError, match="not here"):
        build_fastest(graph, tmp_path / "engine", shapes=[(1, 4), (2, 8), (1, 4)])
    assert asked == {"ort": (), "openvino": ((1, 4), (2, 8))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "ort", "--shape", "1x4"], "--shape is for --backend openvino and auto; ort compiles no shapes"),
        (["--backend", "auto", "--twins"], "--backend auto takes no --twins"),
        (["--backend", "auto", "--checkpoint", "somewhere"], "--checkpoint and --data belong together"),
        (["--backend", "auto", "--shape", "4"], "is not a shape"),
        (["--backend", "trt", "--sparse", "always"], "--sparse always is for --backend cusparselt"),
        (["--backend", "ort", "--no-fuse"], "--no-fuse is for --backend cusparselt"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], message: str, graph: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["build", str(graph), "--out", str(tmp_path / "engine"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
