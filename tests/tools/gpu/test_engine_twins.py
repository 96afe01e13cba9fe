"""Twins of the engine `cusparselt` and Hugging Face's model: order, rehearsal, errors, budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from engines.benchmark.latency import BenchReport, Timing
from engines.cusparselt.machine import Machine
from engines.cusparselt.profiling import KernelRun, ProfiledRun
from engines.cusparselt.stand_in import IntegerReferenceKernels
from nxm_export.contract.records.speedup import Speedup
from nxm_export.errors import EngineError
from nxm_export.pipeline.sparsity_twins import TWINS, BuiltTwins
from nxm_export.storage.json_files import read_record
from tests.engines.cusparselt.machines import SPARSE_KERNEL
from tests.support import tiny
from tools.gpu import engine_twins, twin_tables


def test_the_first_models_come_first_then_trained_checkpoints() -> None:
    models = ["bert-base", "bert-large", "minilm"]
    ordered = [subject.name for subject in engine_twins.subjects(models, ["runs/a/film"], None)]
    assert ordered == [
        *("bert-base-inputs-outputs", "bert-large-inputs-outputs", "film-as-trained", "minilm-inputs-outputs"),
        *("bert-base-inputs", "bert-large-inputs", "minilm-inputs"),
    ]
    assert engine_twins.Subject("minilm", "inputs", layers=2).name == "minilm-2-inputs"


@pytest.mark.slow
def test_twins_are_rehearsed_to_the_end_and_say_that_no_gpu_was_there(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint("bert")
    arguments = ["--rehearse", "--models", "", "--checkpoint", str(checkpoint), "--rounds", "2"]
    arguments += ["--data", str(checkpoint.parent / "dev.tsv")]
    arguments += ["--shapes", "2x8,1x4,1x512", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert engine_twins.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "A STAND-IN: nothing of this is about a GPU" in shown
    # The faster form is taken, and on a CPU either may be: of a dense one it is known that no sparse kernel runs.
    assert any(
        f"verdict: {said}" in shown
        for said in (
            "no verdict: which kernels the sparse engine runs is not known: no kernel of",
            "do not use 2:4 here",
        )
    )
    assert "| 2x8 |" in shown
    page = (tmp_path / "out" / "stand-in-twins.md").read_text(encoding="utf-8")
    assert "A rehearsal on the CPU: nothing of this is about a GPU." in page
    assert "\n\n| shape | FP16, ms |" in page, "a table of Markdown begins behind an empty line"
    file = tmp_path / "out" / "checkpoint-as-trained.json"
    result = read_record(file, engine_twins.Result, schema=engine_twins.SCHEMA, way_out="")
    assert result.complete
    assert result.kind == "stand-in"
    assert result.error is None
    assert [report.timings[0].batch for report in result.bench] == [2, 1]  # 512 is more than the model takes
    assert result.parity is not None
    assert {name: entry.passed for name, entry in result.parity.items()} == {"int8-sparse": True, "int8-dense": True}
    assert result.compared is not None
    assert [Path(report.engine).name for report in result.compared.reports if report.passed] == [*TWINS]
    assert "int8-sparse passed; accuracy " in shown
    assert result.sparsity is not None
    assert result.sparsity.chosen == 0
    assert set(result.profiles) == {"2x8", "1x4"}
    assert len(result.profiles["2x8"].products) == 6 * tiny.LAYERS
    assert result.hugging_face is not None
    assert {shape: set(ways) for shape, ways in result.hugging_face.items()} == {
        "2x8": {"fp16", "compiled"}, "1x4": {"fp16"},
    }  # fmt: skip
    assert result.captured == dict.fromkeys(("fp16", "int8-dense", "int8-sparse"), True)
    written = file.stat().st_mtime_ns
    assert engine_twins.main(arguments) == 0  # what is complete is not measured again
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("given", "measured"),
    [
        ({}, False),
        ({"shapes": ((8, 8),)}, True),
        ({"rounds": 9}, True),
        ({"compiled": 2}, True),
        ({"data": "dev.tsv"}, False),
    ],
)
def test_twins_that_were_measured_otherwise_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], measured: bool
) -> None:
    machine = Machine(IntegerReferenceKernels(), engine_twins.STAND_IN)
    plan = engine_twins.Plan(((2, 8),), 6, tmp_path, tmp_path / "work", 0.0, 1, machine)
    subject = engine_twins.Subject("tiny", "inputs")
    engine_twins.Measuring(subject, plan)._add(complete=True)
    asked = engine_twins.Measuring(subject, replace(plan, **given))
    calls: list[None] = []
    monkeypatch.setattr(asked, "_measure", lambda: calls.append(None))
    asked.run()
    assert bool(calls) is measured
    elsewhere = replace(plan, machine=replace(machine, facts={**engine_twins.STAND_IN, "gpu": "another"}))
    for other in (
        engine_twins.Measuring(subject, elsewhere),
        engine_twins.Measuring(replace(subject, checkpoint="a"), plan),
    ):
        assert not other._is_of_this(asked.run())


@pytest.mark.parametrize("error", [TypeError("no such argument"), AssertionError(), KeyError("a"), OSError("full")])
def test_an_error_of_any_type_ends_one_subject_and_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(engine_twins.Measuring, "_checkpoint", MagicMock(side_effect=error))
    options = ["--rehearse", "--models", "tiny", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert engine_twins.main(options) == 1
    assert capsys.readouterr().out.count(f"error: {type(error).__name__}") == 2
    for placement in engine_twins.PLACEMENTS:
        file = tmp_path / f"tiny-{placement}.json"
        result = read_record(file, engine_twins.Result, schema=engine_twins.SCHEMA, way_out="")
        assert result.trace is not None
        assert "_checkpoint" in result.trace
        assert not result.complete


def test_kernels_are_counted_by_products_and_floats_are_no_sparse_integers() -> None:
    def ran(*names: str) -> tuple[KernelRun, ...]:
        return tuple(KernelRun(name, 1.0) for name in names)

    sparse, dense = SPARSE_KERNEL, "sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x64"
    products = {"a": ran(sparse, "void pad"), "b": ran(sparse, sparse), "c": ran(dense), "d": ()}
    products |= {"e": ran("sm90_xmma_sparse_gemm_f16f16_f16f32_tn_n")}
    said = twin_tables.kernels_in_words(ProfiledRun("", (1, 8), products, None))
    assert said.startswith(f"2 of 5 products ran a sparse INT8 kernel; {sparse} (2), void pad (1), {dense} (1)")
    nothing = twin_tables.kernels_in_words(ProfiledRun("", (1, 8), {"a": ()}, None))
    assert nothing == "0 of 1 products ran a sparse INT8 kernel; no kernel was seen"


def test_hugging_face_is_timed_on_a_gpu_that_is_warm_and_once_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no quantizers, so a second placement has nothing new of it; an idle GPU would make it seem slow."""
    asked: list[float] = []

    def timed(timers: Mapping[str, Any], rounds: int, *, warm_up_s: float) -> dict[str, list[float]]:
        asked.append(warm_up_s)
        return {name: [1.0] * rounds for name in timers}

    monkeypatch.setattr(engine_twins, "interleaved", timed)
    kernels = MagicMock(kind="gpu", device="cpu", capture=lambda call: (call, {}))
    plan = engine_twins.Plan(((2, 8),), 6, tmp_path, tmp_path, 0.0, 1, Machine(kernels, engine_twins.STAND_IN))
    assert engine_twins._milliseconds(lambda **feeds: feeds["input_ids"], (2, 8), 9, plan) == (1.0, True)
    assert asked == [1.0]
    for placement, times in (("inputs-outputs", 2), ("inputs", 0)):
        measuring = engine_twins.Measuring(engine_twins.Subject("tiny", placement), replace(plan, until=math.inf))
        calls: list[str] = []
        monkeypatch.setattr(measuring, "_hugging_face", lambda way, *_, to=calls: to.append(way))
        monkeypatch.setattr(measuring, "_checkpoint", lambda: tmp_path)
        for step in ("_build", "_inspect", "_bench"):
            monkeypatch.setattr(measuring, step, lambda *_: None)
        monkeypatch.setattr(engine_twins, "read_config", lambda _: {"max_position_embeddings": 64, "vocab_size": 9})
        monkeypatch.setattr("engines.cusparselt.backend.load", lambda _: nullcontext())
        monkeypatch.setattr(engine_twins, "parity", lambda *_: {})
        measuring._measure()
        assert calls == ["fp16", "compiled"][:times]
        assert measuring.result.complete
        monkeypatch.setattr(engine_twins, "parity", MagicMock(side_effect=ModuleNotFoundError("sklearn")))
        calls.clear()
        measuring._measure()
        assert calls == ["fp16", "compiled"][:times], "what does not depend on parity is measured without it"
        assert measuring.result.error == "ModuleNotFoundError: sklearn"
        assert not measuring.result.complete


@pytest.mark.parametrize("lost", [None, "fp16", "int8-sparse"])
def test_a_step_that_fails_leaves_the_others_to_be_measured(
    lost: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine is there for minutes: without a profiler, or memory for one shape, there is much left to be shown."""
    machine = Machine(IntegerReferenceKernels(), engine_twins.STAND_IN)
    plan = engine_twins.Plan(((8, 8), (2, 8)), 6, tmp_path, tmp_path, math.inf, 1, machine)
    measuring = engine_twins.Measuring(engine_twins.Subject("tiny", "inputs-outputs"), plan)
    built = BuiltTwins("cusparselt", {}, {} if lost is None else {lost: "no kernel"})
    calls: list[object] = []

    def timed(engines: Mapping[str, object], shapes: list[tuple[int, int]], **_: object) -> BenchReport:
        calls.append(shapes[0])
        if shapes == [(8, 8)]:
            raise EngineError("CUDA out of memory")
        timings = tuple(Timing(name, 2, 8, 2.0, (2.0, 2.0), 6, queued=1.0) for name in engines)
        ratios = (Speedup("int8-sparse", "int8-dense", 2, 8, 2.0, (1.9, 2.1)),) if lost is None else ()
        return BenchReport(timings, ratios)

    monkeypatch.setattr(measuring, "_checkpoint", lambda: tmp_path)
    monkeypatch.setattr(measuring, "_inspect", MagicMock(side_effect=RuntimeError("CUPTI")))
    monkeypatch.setattr(measuring, "_hugging_face", lambda way, *_: calls.append(way))
    monkeypatch.setattr(engine_twins, "build_twins", lambda *_: built)
    monkeypatch.setattr(engine_twins, "bench", timed)
    monkeypatch.setattr(engine_twins, "read_config", lambda _: {"max_position_embeddings": 64, "vocab_size": 9})
    monkeypatch.setattr("engines.cusparselt.backend.load", lambda _: nullcontext())
    monkeypatch.setattr(engine_twins, "parity", lambda *_: {})
    result = measuring.run()
    assert calls == [(8, 8), (2, 8), "fp16", "compiled"]
    assert len(result.bench) == 1
    assert result.parity == {}
    assert result.error == ("RuntimeError: CUPTI" if lost is None else f"{lost} could not be built: no kernel")
    assert not result.complete
    assert result.verdict == "no verdict: which kernels the sparse engine runs is not known"
    shown = "\n".join(twin_tables.tables([result]))
    ms = {name: "-" if name == lost else "2.0000" for name in ("fp16", "int8-dense", "int8-sparse")}
    assert f"| 2x8 | {ms['fp16']} | {ms['int8-dense']} | {ms['int8-sparse']} |" in shown


@pytest.mark.parametrize(("family", "attention"), [("bert", "sdpa"), ("mpnet", "eager")])
def test_a_model_of_theirs_without_fused_attention_is_called_so(
    family: str, attention: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    machine = Machine(IntegerReferenceKernels(), engine_twins.STAND_IN)
    model = engine_twins._model(tiny_checkpoint(family), machine, compiled=False)
    assert model.attention == attention
    ids = torch.ones(1, 4, dtype=torch.int64)
    assert model.call(input_ids=ids, attention_mask=ids).shape[0] == 1


def test_checkpoints_of_one_name_would_share_their_results(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        engine_twins.main(["--rehearse", "--out", str(tmp_path), "--checkpoint", "a/one", "--checkpoint", "b/one"])
    assert not [*tmp_path.iterdir()]


def test_twins_stop_at_the_budget_and_list_what_was_not_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert engine_twins.main(["--rehearse", "--models", "tiny", "--budget", "-1", "--out", str(out)]) == 1
    assert "not reached: tiny-inputs-outputs, tiny-inputs" in capsys.readouterr().out
    assert "not reached: tiny-inputs-outputs" in (out / "stand-in-twins.md").read_text(encoding="utf-8")
