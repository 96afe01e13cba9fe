"""Which engines a run has, by backend, machine and plan; which of them it keeps; what of an earlier run goes away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from engines.base import BACKENDS
from engines.parity.reports import OUTPUTS_FILE, PARITY_FILE
from nxm_export.contract.choices import BACKEND_NAMES
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.pipeline import engine_stages, run_engines
from nxm_export.pipeline.engine_stages import build_engines, choose_engine, compare_built, drop_others
from nxm_export.pipeline.environment import missing_for
from nxm_export.pipeline.run_engines import GRAPHS, RunBackends, engines_of, graphs_of, run_backends
from nxm_export.pipeline.summary import BuildResults
from nxm_export.progress import silent
from nxm_export.storage.json_files import encode
from nxm_export.storage.run_dir import RunDir
from tests.support.made_runs import parity
from tests.support.records import PASSPORT

Lacks = Callable[[Mapping[str, str]], None]
CPU_ALONE = {name: f"no GPU for {name}" for name in ("trt", "trt_rtx", "cusparselt")}


@pytest.fixture
def lacks(monkeypatch: pytest.MonkeyPatch) -> Lacks:
    """Makes this a machine that lacks what the given backends need, and nothing else."""
    return lambda missing: monkeypatch.setattr(run_engines, "missing_for", missing.get)


def names(backends: RunBackends, kind: str = "int8") -> list[str]:
    return [engine.name for engine in engines_of(backends, kind, [*graphs_of(backends, kind)])]


ORT = ["ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int8-outputs"]


def test_without_a_wish_a_cpu_gets_onnx_runtime_and_what_builds_ahead_of_time(lacks: Lacks) -> None:
    lacks(CPU_ALONE)
    backends = run_backends(())
    assert names(backends) == [*ORT, "trt_rtx-fp16-int8"]
    assert backends.candidates == ("ort",)
    assert names(backends, "sparse")[1] == "ort-cpu-sparse"


def test_auto_takes_what_runs_here_and_says_why_the_others_do_not(lacks: Lacks) -> None:
    lacks(CPU_ALONE)
    backends = run_backends(("auto",))
    assert names(backends) == [*ORT, "openvino-cpu-int8"]
    assert backends.candidates == ("ort", "openvino")
    assert backends.left_out == CPU_ALONE
    assert "trt" not in graphs_of(backends, "int8")


@pytest.mark.parametrize("asked", [(), ("auto",), ("cusparselt",)], ids=str)
def test_a_gpu_gets_twins_the_dense_one_first(asked: tuple[str, ...], lacks: Lacks) -> None:
    """Twins tell what 2:4 gains; a plan without integers has none, as they compare INT8."""
    lacks(dict.fromkeys(("trt", "trt_rtx"), "not installed"))
    backends = run_backends(asked)
    of_gpu = [engine for engine in engines_of(backends, "int8", [*GRAPHS]) if engine.backend == "cusparselt"]
    assert [(engine.name, engine.twin, engine.sparse, engine.main) for engine in of_gpu] == [
        ("cusparselt-fp16-int8-dense", "int8-dense", "never", False),
        ("cusparselt-fp16-int8", "int8-sparse", "auto", True),
        ("cusparselt-fp16-float", "fp16", "never", False),
    ]
    assert {"trt", "trt-float"} <= graphs_of(backends, "int8").keys()
    assert "cusparselt-fp16-sparse" in names(backends, "sparse")
    assert "trt-float" not in graphs_of(backends, "sparse")


def test_what_is_asked_for_is_built_and_chosen_from_in_that_order(lacks: Lacks) -> None:
    lacks(CPU_ALONE)
    backends = run_backends(("openvino", "ort", "openvino"))
    assert backends.candidates == ("openvino", "ort")
    assert names(run_backends(("openvino",))) == ["ort-cpu-fp32", "openvino-cpu-int8"], "FP32 is the yardstick"


def test_what_cannot_run_here_is_refused_with_the_reason(lacks: Lacks) -> None:
    lacks(CPU_ALONE)
    with pytest.raises(EngineUnavailable, match="backend trt cannot run here: no GPU for trt"):
        run_backends(("ort", "trt"))
    with pytest.raises(EngineError, match="unknown backend 'tpu'"):
        run_backends(("tpu",))
    with pytest.raises(EngineError, match="give it alone"):
        run_backends(("auto", "ort"))


def test_this_machine_says_of_every_backend_whether_it_runs() -> None:
    assert tuple(BACKENDS) == BACKEND_NAMES
    missing = {name: missing_for(name) for name in BACKEND_NAMES}
    assert missing["ort"] is None
    assert all(why is None or len(why) > 10 for why in missing.values())


@pytest.mark.parametrize(("installed", "graph"), [("8.6.1", "trt8"), ("10.3.0", "trt"), (None, "trt")])
def test_tensorrt_8_gets_a_graph_that_it_reads(
    installed: str | None, graph: str, lacks: Lacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(_: str) -> str:
        if installed is None:
            raise PackageNotFoundError
        return installed

    lacks({})
    monkeypatch.setattr(run_engines, "version", version)
    assert {engine.graph for engine in engines_of(run_backends(("trt",)), "int8", [*GRAPHS])} == {
        "dense", graph, f"{graph}-float",
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


BOTH = RunBackends(("ort", "openvino"), ("ort", "openvino"))
ENGINES = engines_of(BOTH, "int8", [*GRAPHS])
BUILT = BuildResults({engine.name: engine.graph for engine in ENGINES}, {}, {})


def compared(run: RunDir, **passed: bool) -> None:
    """A comparison of each backend's engine that passed, or did not."""
    for backend, good in passed.items():
        directory = run.path("compare", f"{backend}-cpu-int8")
        directory.mkdir(parents=True)
        (directory / PARITY_FILE).write_text(encode(parity(passed=good).content.to_dict()), encoding="utf-8")


def test_an_engine_that_fails_the_comparison_is_not_kept_however_fast(run: RunDir) -> None:
    compared(run, ort=True, openvino=False)
    chosen = choose_engine(run, ENGINES, BUILT, BOTH)
    assert (chosen.name, chosen.backend) == ("ort-cpu-int8", "ort")
    assert chosen.why == (
        "the only one that passes the comparison; left out: openvino: it does not compute what the checkpoint computes"
    )


def test_an_engine_that_failed_a_later_comparison_is_not_kept(run: RunDir) -> None:
    compared(run, ort=True, openvino=True)
    directory = run.path("engines", "ort-cpu-int8")
    directory.mkdir(parents=True)
    PASSPORT.save(directory)
    (directory / PARITY_FILE).write_text(encode(parity(passed=False).content.to_dict()), encoding="utf-8")
    chosen = choose_engine(run, ENGINES, BUILT, BOTH)
    assert chosen.name == "openvino-cpu-int8"
    assert f"left out: ort: {directory / PARITY_FILE} says that it failed a later comparison" in chosen.why


def test_where_none_passes_that_is_said(run: RunDir) -> None:
    compared(run, ort=False, openvino=False)
    chosen = choose_engine(run, ENGINES, BUILT, BOTH)
    assert chosen.name == "ort-cpu-int8"
    assert chosen.why.startswith("no engine passes the comparison; left out: ort: it does not compute")


def test_one_that_was_not_built_is_left_out_with_its_reason(run: RunDir) -> None:
    compared(run, ort=True)
    failed = replace(BUILT, graphs={"ort-cpu-int8": "cpu"}, failed={"openvino-cpu-int8": "it refuses Erf"})
    assert "left out: openvino: it refuses Erf" in choose_engine(run, ENGINES, failed, BOTH).why
    alone = RunBackends(("openvino",), ("openvino",))
    with pytest.raises(EngineUnavailable, match=r"no engine of openvino runs here \(openvino: it refuses Erf\)"):
        choose_engine(run, engines_of(alone, "int8", [*GRAPHS]), failed, alone)


def test_of_two_that_pass_the_measurement_decides(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    told = '{"schema":"nxm-choice/1","backend":"openvino","why":"2.00x","shapes":[],"candidates":[],"left_out":{}}'
    asked: list[tuple[str, ...]] = []

    def measured(*arguments: str) -> str:
        asked.append(arguments)
        return told

    monkeypatch.setattr(engine_stages, "in_own_process", measured)
    compared(run, ort=True, openvino=True)
    for engine in ENGINES:
        run.path("engines", engine.name).mkdir(parents=True)
        PASSPORT.save(run.path("engines", engine.name))
    for _ in range(2):
        chosen = choose_engine(run, ENGINES, BUILT, BOTH)
        assert (chosen.name, chosen.why) == ("openvino-cpu-int8", "2.00x")
    assert len(asked) == 1, "a stage that is up to date is skipped"
    assert asked[0][1:] == tuple(f"{name}={run.path('engines', f'{name}-cpu-int8')}" for name in ("ort", "openvino"))
    choose_engine(run, ENGINES, BUILT, replace(BOTH, candidates=("ort",)))
    assert not run.path("choice").exists(), "of a choice that this run did not make"


def test_an_engine_that_fails_when_it_runs_fails_alone(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of training lie behind a run, and the other engines before it."""

    def compare(_: Path, engine: Path, __: object) -> None:
        if engine.name.startswith("openvino"):
            raise EngineError("out of memory")
        for name in (PARITY_FILE, OUTPUTS_FILE):
            (engine / name).write_text(encode(parity().content.to_dict()))

    monkeypatch.setattr("engines.parity.compare.compare", compare)
    for engine in ENGINES:
        run.path("engines", engine.name).mkdir(parents=True)
        PASSPORT.save(run.path("engines", engine.name))
    for source in ("dense", "checkpoint"):
        run.path(source).mkdir()
    run.stage("compare openvino-cpu-int8", "compare/openvino-cpu-int8", lambda s: (s / PARITY_FILE).write_text("old"))
    built = compare_built(run, ENGINES, BUILT, [], silent)
    assert built.failed == {"openvino-cpu-int8": "built, and failed when it ran: out of memory"}
    assert built.compared == ("ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int8-outputs")
    assert not run.path("compare", "openvino-cpu-int8").exists(), "an older run's verdict on it"
    chosen = choose_engine(run, ENGINES, built, BOTH)
    assert chosen.backend == "ort"
    assert "left out: openvino: built, and failed when it ran: out of memory" in chosen.why


def test_where_one_that_every_run_needs_fails_an_older_verdict_on_it_goes_too(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: object) -> None:
        raise EngineError("out of memory")

    monkeypatch.setattr("engines.parity.compare.compare", compare)
    (first, *_) = ENGINES
    run.path("engines", first.name).mkdir(parents=True)
    PASSPORT.save(run.path("engines", first.name))
    run.path("dense").mkdir()
    run.stage(f"compare {first.name}", f"compare/{first.name}", lambda s: (s / PARITY_FILE).write_text("old"))
    with pytest.raises(EngineError, match="out of memory"):
        compare_built(run, [first], BUILT, [], silent)
    assert not run.path("compare", first.name).exists()


@pytest.mark.parametrize("name", ["openvino-cpu-int8", "ort-cpu-int8"])
def test_of_an_engine_that_cannot_be_built_nothing_of_an_earlier_run_stays(
    name: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the engine nor the verdict on it; the others keep both."""

    def made(out: Path) -> str:
        return out.name.removeprefix(".").removesuffix(".partial")

    class Builder:
        @staticmethod
        def build(_: Path, out: Path, options: object) -> None:
            if made(out) == name:
                raise EngineError("it refuses Erf")
            (out / "passport.json").write_text(made(out))

    for graph in ("dense", "cpu", "cpu-outputs"):
        run.path("onnx", graph).mkdir(parents=True)
    for engine in ENGINES:
        place = f"engines/{engine.name}"
        run.stage(f"build {engine.name}", place, lambda out: (out / "passport.json").write_text(made(out)))
        for stage in ("compare", "summary"):
            inputs = {"passport": run.path(place, "passport.json")}
            run.stage(
                f"{stage} {engine.name}", f"{stage}/{engine.name}", lambda out: (out / "f").touch(), inputs=inputs
            )
    monkeypatch.setattr("engines.base.backend", lambda _: Builder)
    if name.startswith("ort"):
        with pytest.raises(EngineError, match="it refuses Erf"):
            build_engines(run, ENGINES, silent)
    else:
        assert build_engines(run, ENGINES, silent).failed == {name: "it refuses Erf"}
    for engine in ENGINES:
        for kind in ("engines", "compare", "summary"):
            assert run.path(kind, engine.name).exists() == (engine.name != name)
    stages = RunDir.open(run.root).manifest.stages
    assert {stage.partition(" ")[2] for stage in stages} == {engine.name for engine in ENGINES} - {name}


def test_engines_and_graphs_of_an_earlier_run_go_away(run: RunDir) -> None:
    for stage, output in (
        ("export trt", "onnx/trt"), ("export cpu", "onnx/cpu"),
        ("build openvino-cpu-int8", "engines/openvino-cpu-int8"),
        ("compare openvino-cpu-int8", "compare/openvino-cpu-int8"), ("build ort-cpu-int8", "engines/ort-cpu-int8"),
    ):  # fmt: skip
        run.stage(stage, output, lambda scratch: (scratch / "file").write_text("made"))
    drop_others(run, engines_of(RunBackends(("ort",), ("ort",)), "int8", ["dense", "cpu"]), ["dense", "cpu"])
    assert {*run.manifest.stages} == {"export cpu", "build ort-cpu-int8"} == {*RunDir.open(run.root).manifest.stages}
    assert sorted(path.name for path in run.root.rglob("*") if path.is_file() and path.name == "file") == ["file"] * 2
