"""The tools for a GPU machine start, rehearse without a GPU, and say what is missing where they cannot."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import json
import lzma
import math
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engines.benchmark.latency import BenchReport, Timing
from engines.cusparselt.machine import Machine
from engines.cusparselt.profiling import KernelRun, ProfiledRun
from engines.cusparselt.stand_in import IntegerReferenceKernels
from engines.sparsity.build_evidence import LayerInfo
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget, WeightSparsity
from nxm_export.contract.records.speedup import Speedup
from nxm_export.errors import ArtifactError
from nxm_export.pipeline.sparsity_twins import TWINS
from nxm_export.storage.json_files import read_record
from tests.engines.cusparselt.fake_capture import FakeCapture
from tests.engines.cusparselt.machines import SPARSE_KERNEL
from tests.support import tiny
from tools import ROOT
from tools.gpu import checkpoints, engine_twins, glue_rows, issue4694, training_probe, transfers
from tools.gpu.cusparselt import __main__ as cusparselt
from tools.gpu.cusparselt import gemms
from tools.gpu.cusparselt.gemms import Gemm
from tools.gpu.cusparselt.timing import Timer
from tools.gpu.tensorrt86 import LIBRARIES, VERSION, pack, unpack
from tools.gpu.tensorrt86 import engines as engines86
from tools.gpu.tensorrt86 import evidence as evidence86
from tools.gpu.tensorrt86.manifest import Manifest
from tools.results import run, tasks
from tools.results.store import TaskStore

COMMANDS = (
    "evidence",
    "sparse_kernels",
    "training_probe",
    "glue_rows",
    "checkpoints",
    "issue4694",
    "cusparselt.__main__",
    "engine_twins",
    "fake_accelerator.__main__",
    "tensorrt86.pack",
    "tensorrt86.unpack",
    "tensorrt86.graphs",
    "tensorrt86.engines",
    "tensorrt86.evidence",
)
# What the carried Python 3.10 imports there, besides the packages that keep to it anyway.
ON_310 = ("__init__", "rendering", "gpu/__init__", "gpu/evidence", "gpu/tensorrt86/__init__", "gpu/tensorrt86/engines")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        importlib.import_module(f"tools.gpu.{command}").main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: " in shown
    assert len(shown) > 300


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evidence", ["--work", "{}"], "needs an NVIDIA GPU and its driver"),
        ("cusparselt.__main__", ["--out", "{}/x.json"], "no CUDA device here; --rehearse"),
        ("engine_twins", ["--out", "{}/twins"], "no engine of cusparselt can be built or run here"),
        ("training_probe", ["run", "{}", "--out", "{}"], "no CUDA device here; --cpu-only"),
        ("glue_rows", ["run", "{}", "--out", "{}"], "no CUDA device here; --cpu-only"),
        ("tensorrt86.unpack", ["--folder", "{}"], "manifest.json is missing"),
        ("tensorrt86.engines", ["{}", "{}", "a:b:1x8"], "TensorRT is not installed"),
        ("tensorrt86.evidence", ["--out", "{}", "--place", "{}"], "python310 is missing"),
        ("sparse_kernels", ["{}/lib.so"], "no such file"),
    ],
)
def test_what_is_missing_is_said_in_a_line(
    command: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    filled = [argument.format(tmp_path) for argument in arguments]
    assert importlib.import_module(f"tools.gpu.{command}").main(filled) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("module", ON_310)
def test_what_the_carried_python_imports_keeps_its_syntax(module: str) -> None:
    ast.parse((ROOT / "tools" / f"{module}.py").read_text(encoding="utf-8"), feature_version=(3, 10))


# cuSPARSELt


def test_products_and_a_layer_are_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "out" / "report.json"
    options = ["--rehearse", "--models", "tiny", "--rows", "128", "--out", str(file)]
    child = subprocess.run(
        [sys.executable, "-m", "tools.gpu.cusparselt", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["problems"] == report["skipped"] == []
    assert {gemm["name"] for gemm in report["gemms"]} == {"ffn-up", "ffn-down", "qkv", "proj"}
    for gemm in report["gemms"]:
        assert gemm["failed"] == {}
        assert gemm["deviations"]["int8 2:4, int32"] == gemm["deviations"]["int_mm against float64"] == 0
        assert gemm["deviations"]["int8 2:4, fp16"] < 1e-3  # FP16 rounds to 2^-11
    (layer,) = report["layers"]
    assert layer["errors"]["int8 2:4, int32 against int8"] == 0
    assert layer["errors"]["int8 against fp16"] < 0.05
    assert "tiny ffn-up 128 512 128: " in child.stdout
    page = (file.parent / "stand-in-products.md").read_text(encoding="utf-8")
    assert "A rehearsal on the CPU: nothing of this is about a GPU." in page
    assert f"| command | `python3 -m tools.gpu.cusparselt {' '.join(options)}` |" in page
    assert "| tiny qkv | 128x384 | 128 | no verdict: at M 128 " in page, "the host's clock says nothing of a device"


def test_the_budget_ends_the_measuring_and_what_was_not_reached_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rehearse", "--models", "tiny", "--rows", "128", "--budget", "0"]
    assert cusparselt.main([*options, "--out", str(tmp_path / "x.json")]) == 1
    assert "not reached: tiny ffn-up 128, " in capsys.readouterr().out


def test_the_most_telling_products_come_first() -> None:
    names = [str(job) for job in cusparselt.jobs(["bert-base", "minilm"], [4096, 128, 1024])]
    assert names[:5] == [f"bert-base {name} 4096" for name in ("ffn-up", "ffn-down", "qkv", "proj", "layer")]
    assert names.index("minilm layer 4096") < names.index("bert-base ffn-up 1024")


def gemm(m: int, dense: float, sparse: float, **facts: Any) -> Gemm:
    """A product that a GPU timed by CUDA graphs, right in every form."""
    ways = {gemms.INT8: dense, gemms.SPARSE: sparse, gemms.FP16: 2 * dense, gemms.SPARSE_F16: sparse / 2}
    given: dict[str, Any] = {
        "microseconds": ways,
        "timed_by": dict.fromkeys(ways, "graph"),
        "deviations": {gemms.SPARSE: 0.0, gemms.SPARSE_F16: 2e-4, "int_mm against float64": 0.0},
    }
    return Gemm("bert", "qkv", m, 96, 32, **(given | facts))


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ([gemm(128, 10, 5), gemm(4096, 10, 8)], "from M = 128 on"),
        ([gemm(128, 10, 12), gemm(1024, 10, 8), gemm(4096, 10, 8)], "from M = 1024 on"),
        ([gemm(128, 10, 5), gemm(4096, 10, 9.8)], "no: not at M = 4096"),  # 2 % are no gain
        ([gemm(128, 10, 5), gemm(4096, 10, float("nan"))], "no: not at M = 4096"),
        ([gemm(128, 10, 5), gemm(4096, 10, 5, microseconds={gemms.INT8: 10.0})], "no verdict: at M 4096 "),
        ([gemm(128, 10, 5, deviations={gemms.SPARSE: 1.0, "int_mm against float64": 0.0})], "no verdict: at M 128 "),
        ([gemm(128, 10, 5, deviations={gemms.SPARSE: 0.0, "int_mm against float64": 3.0})], "no verdict: at M 128 "),
        ([gemm(128, 10, 5, deviations={})], "no verdict: at M 128 "),
        ([gemm(128, 10, 5, timed_by={gemms.INT8: "eager", gemms.SPARSE: "graph"})], "no verdict: at M 128 "),
        ([gemm(128, 10, 5, timed_by=dict.fromkeys((gemms.INT8, gemms.SPARSE), "eager"))], "no verdict: at M 128 "),
    ],
)
def test_two_four_pays_from_the_rows_on_where_it_is_faster_at_all_that_were_measured(
    measured: list[Gemm], said: str
) -> None:
    (row,) = gemms.verdict_rows(list(reversed(measured)))
    assert row[:3] == ["bert qkv", "32x96", ", ".join(str(each.m) for each in measured)]
    assert row[3].startswith(said)


def test_a_gain_is_told_beside_the_one_over_floats_and_the_one_with_scale_and_bias_inside() -> None:
    assert gemms.verdict_rows([gemm(128, 10, 12), gemm(1024, 10, 8)])[0][4:] == ["1.25x at 1024", "2.50x", "2.50x"]
    wrong = gemm(128, 10, 8, deviations={gemms.SPARSE: 0.0, gemms.SPARSE_F16: 0.5, "int_mm against float64": 0.0})
    assert gemms.verdict_rows([wrong])[0][4:] == ["1.25x at 128", "2.50x", "-"]


def test_a_gpu_that_was_idle_is_warmed_up_before_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling a way takes seconds, in which clocks fall: the next time would be of a slow GPU."""
    cuda = FakeCapture(monkeypatch)
    clock = FakeClock()
    monkeypatch.setattr("tools.gpu.cusparselt.timing.time", clock)
    timer = Timer("cuda", 2, 3, [])

    def calls_of_a_time() -> int:
        calls: list[None] = []

        def call() -> None:
            calls.append(None)
            clock.now += 0.01

        timer.time("cublas", [call])
        return len(calls)

    first, second = calls_of_a_time(), calls_of_a_time()
    clock.now += 5.0
    assert calls_of_a_time() == first == second + 30  # 0.3 s of calls of 10 ms
    assert cuda.stream == cuda.OWN


class FakeClock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


# The engine's twins


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
    assert "no sparse kernel is proven to run on stand-in" in shown
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
    said = engine_twins._kernels_in_words(ProfiledRun("", (1, 8), products, None))
    assert said.startswith(f"2 of 5 products ran a sparse INT8 kernel; {sparse} (2), void pad (1), {dense} (1)")
    nothing = engine_twins._kernels_in_words(ProfiledRun("", (1, 8), {"a": ()}, None))
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


# Issue 4694


def test_the_forms_of_products_are_counted_by_types_kernel_and_outcome() -> None:
    def weight(node: str, reason: str | None, *, planned_sparse: bool = True) -> WeightSparsity:
        planned = "2:4+W8" if planned_sparse else "W8"
        return WeightSparsity(
            *(node, 64, 64, "MatMul", planned, planned_sparse, "2:4", "2:4", True, True, reason is None),
            *("sp_kernel" if reason is None else None, reason, ""),
            node=node,
        )

    def layer(nodes: tuple[str, ...], output: str, kernel: str) -> LayerInfo:
        return LayerInfo("+".join(nodes), "gemm", ("Int8", "Int8"), ("Int8",), (output,), kernel, nodes)

    target = SparsityTarget("trt", "10.3", "8.0", sparse_flag=True, has_gpu=True)
    weights = (weight("a", "dense-kernel"), weight("b", "dense-kernel"), weight("c", None))
    report = SparsityReport(target, (*weights, weight("d", "no-gpu"), weight("e", None, planned_sparse=False)))
    counted = issue4694.forms(report, [layer(("a", "b"), "Half", "dense"), layer(("c", "e"), "Int8", "sp_kernel")])
    assert issue4694.table({"int8-out": counted}).splitlines()[2:] == [
        "| int8-out | 2 | Int8 | Half | dense | dense-kernel |",
        "| int8-out | 1 | Int8 | Int8 | sp_kernel | sparse |",
        "| int8-out | 1 | ? | ? | ? | no-gpu |",
    ]


@pytest.mark.slow
def test_both_presets_of_issue_4694_are_built_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'nxm-export[trt-rtx]'")
    out = tmp_path / "table.md"
    options = ["--model", "tiny", "--shape", "2x16", "--level", "0", "--work", str(tmp_path), "--out", str(out)]
    assert issue4694.main(options) == 0
    rows = [line.split(" | ") for line in out.read_text(encoding="utf-8").splitlines()[2:]]
    assert {row[0] for row in rows} == {"| float-out", "| int8-out"}
    assert sum(int(row[1]) for row in rows) == 2 * 6
    assert {row[2] for row in rows} == {"Int8"}
    assert not any(row[-1].startswith("sparse") for row in rows), "no GPU has chosen a kernel"
    assert out.read_text(encoding="utf-8") in capsys.readouterr().out


# Training


def test_training_is_rehearsed_on_the_cpu(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    run = tiny_checkpoint("bert").parent
    assert training_probe.main(["pack", str(run), "--data", str(run), "--out", str(tmp_path / "data")]) == 0
    options = ["--cpu-only", "--steps", "2", "--cpu-steps", "2", "--out", str(tmp_path / "out"), "--only", "obs"]
    assert training_probe.main(["run", str(tmp_path / "data"), *options]) == 0
    report = json.loads((tmp_path / "out" / "training_probe.json").read_text(encoding="utf-8"))
    outcome = report["runs"]["obs-cpu"]
    assert outcome["error"] is None
    assert outcome["metrics"]["steps"] == 2
    assert outcome["phases"]
    page = (tmp_path / "out" / "stand-in-training.md").read_text(encoding="utf-8")
    assert "nothing of this is about a GPU" in page
    assert f"| obs-cpu | {outcome['seconds']} |" in page


def test_the_page_has_what_failed_and_where_steps_wait() -> None:
    failed = training_probe.Outcome(error="RuntimeError: a | b\nmore", peak_mib=12.0)
    alike = {"obs": training_probe.Alike(1.0, 0.5, 0.25)}
    report = training_probe.Report(runs={"nxm": failed}, alike=alike, waits={"trainer.py:9 x.item()": 3})
    table, masks, waits = training_probe.sections(report)
    assert table.splitlines()[-1] == "| nxm | None | - | 12.0 | - | RuntimeError: a \\| b more |"
    assert "- obs: 100.0000% of masks and 50.0000% of weights are the CPU's, largest difference 0.25" in masks
    assert "- 3 times at trainer.py:9 x.item()" in waits


def test_equal_checkpoints_are_alike_and_others_are_not(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weight = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    save_file({"a.weight": weight, "embeddings.weight": weight}, tmp_path / "a.safetensors")
    save_file(
        {"a.weight": weight + np.eye(2, dtype=np.float32)[::-1], "embeddings.weight": weight},
        tmp_path / "b.safetensors",
    )
    same = training_probe.alike(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert same == training_probe.Alike(1.0, 1.0, 0.0)
    other = training_probe.alike(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert other == training_probe.Alike(equal_masks=0.5, equal_weights=0.5, largest_difference=1.0)


def test_a_run_that_is_too_large_or_lacks_something_is_not_packed(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tiny_checkpoint("bert").parent
    assert training_probe.main(["pack", str(run), "--data", str(tmp_path), "--out", str(tmp_path / "data")]) == 1
    assert "train.tsv is not there; give a finished run" in capsys.readouterr().err
    monkeypatch.setattr(transfers, "PART_MIB", 0)
    assert training_probe.main(["pack", str(run), "--data", str(run), "--out", str(tmp_path / "data")]) == 1
    assert "travel at a time; pack a run of a smaller model" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


# What travels


def test_the_tree_fits_into_the_room_that_pieces_leave_for_it() -> None:
    """A transfer with the largest piece would be refused on first contact."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\0")
    files = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    if not files:
        pytest.skip("this tree has no history here")
    assert sum(file.stat().st_size for file in files) / 2**20 < transfers.TREE_MIB - 0.5, "half a MiB is for wheels"
    assert pack.CHUNK_BYTES == transfers.PART_MIB << 20


def test_trained_checkpoints_travel_in_pieces_and_are_the_same_there(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"one": tiny_checkpoint("bert"), "two": tiny_checkpoint("mpnet")}
    for name, checkpoint in source.items():
        shutil.copytree(checkpoint, tmp_path / name / "checkpoint")
    folder, place = tmp_path / "carried", tmp_path / "there"
    manifest = checkpoints.pack([tmp_path / name / "checkpoint" for name in source], folder, part_mib=40_000 / 2**20)
    parts = sorted(folder.glob("c*"))
    assert len(parts) > 2
    sizes = [sum(file.stat().st_size for file in part.iterdir()) for part in parts]
    assert set(sizes[:-1]) == {40_000}
    assert [carried.name for carried in manifest.files] == list(source)
    unpacking = ["unpack", "--folder", str(folder), "--out", str(place)]
    late = parts[-1].rename(tmp_path / "late")
    assert checkpoints.main(unpacking) == 2
    assert f"missing: {parts[-1].name}/two" in capsys.readouterr().out
    assert [entry.name for entry in place.iterdir()] == ["one"]
    late.rename(parts[-1])
    assert checkpoints.main(unpacking) == 0
    for name, checkpoint in source.items():
        ours, theirs = (load_file(path / "model.safetensors") for path in (checkpoint, place / name))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_pieces_that_are_damaged_or_of_two_checkpoints_of_one_name_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = tiny_checkpoint("bert"), tmp_path / "carried"
    with pytest.raises(ArtifactError, match="two checkpoints are named"):
        checkpoints.pack([checkpoint, checkpoint], folder)
    assert not folder.exists()
    checkpoints.pack([checkpoint], folder)
    (piece,) = folder.glob("c01/*")
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(data)
    assert checkpoints.main(["unpack", "--folder", str(folder), "--out", str(tmp_path / "there")]) == 1
    assert "is not what was packed; send its pieces again" in capsys.readouterr().err
    assert not [*(tmp_path / "there").iterdir()]
    assert checkpoints.main(["unpack", "--folder", str(tmp_path), "--out", str(tmp_path / "there")]) == 1


# Rows of results


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """What travels for one unit: a tiny encoder, its data as CoLA, a dense and a compressed row."""
    tiny.write_model("bert", tmp_path / "encoder")
    tiny.write_data(tmp_path / "glue" / "CoLA")
    options = ["--data", str(tmp_path / "glue"), "--model", str(tmp_path / "encoder"), "--seeds", "1"]
    options += ["--tasks", "cola:3e-3:1", "--rows", "dense,magnitude-2:4+W4", "--out", str(tmp_path / "packed")]
    assert glue_rows.main(["pack", *options]) == 0
    return tmp_path / "packed"


def rehearse(packed: Path, work: str, *more: str) -> int:
    place = ["--work", str(packed.parent / work), "--out", str(packed.parent / "out")]
    return glue_rows.main(
        ["run", str(packed), "--cpu-only", "--steps", "2", "--max-length", "48", *place, "--budget", "600", *more]
    )


def archived(packed: Path) -> list[str]:
    with tarfile.open(packed.parent / "out" / glue_rows.ARCHIVE) as archive:
        return [name for name in archive.getnames() if name.endswith(".jsonl")]


def test_rows_that_are_cut_off_go_on_and_whole_units_travel_with_the_next_call(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("nxm_export.data.bootstrap_intervals", "tools.results.bootstrap"):
        monkeypatch.setattr(f"{module}.RESAMPLES", 20)
    assert rehearse(packed, "work", "--budget", "-1") == 1
    assert "not reached: cola-s0" in capsys.readouterr().out
    with monkeypatch.context() as cut:
        cut.setattr(run, "compress", MagicMock(side_effect=RuntimeError("the device is gone")))
        assert rehearse(packed, "work") == 1
    assert "cola-s0: RuntimeError: the device is gone" in capsys.readouterr().err
    assert archived(packed) == ["unfinished/cola-s0/cola.jsonl"]
    with monkeypatch.context() as kept:
        kept.setattr(run, "finetune", MagicMock(side_effect=AssertionError("the dense model is there")))
        assert rehearse(packed, "work") == 0
    assert archived(packed) == ["results/cola.jsonl"]
    with tarfile.open(packed.parent / "out" / glue_rows.ARCHIVE) as archive:
        archive.extractall(packed, filter="data")
    records = TaskStore(packed / "results", tasks.task_named("cola")).records()
    assert [record.row for record in records] == ["dense", "magnitude-2:4+W4"]
    assert records[1].teacher_sha256 == records[0].weights_sha256
    assert records[0].model == "encoder, stored as FP16"
    assert rehearse(packed, "another-machine") == 0  # all is there: nothing is measured
    assert not (packed.parent / "another-machine" / "unfinished").exists()


def test_rows_that_do_not_fit_into_a_transfer_travel_in_pieces(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {file.relative_to(packed): file.read_bytes() for file in packed.rglob("*") if file.is_file()}
    monkeypatch.setattr(transfers, "PART_MIB", 0.05)
    options = ["--data", str(packed.parent / "glue"), "--model", str(packed.parent / "encoder"), "--seeds", "1"]
    options += ["--tasks", "cola:3e-3:1", "--rows", "dense,magnitude-2:4+W4", "--out", str(packed)]
    assert glue_rows.main(["pack", *options]) == 0
    pieces = sorted(packed.glob("c*"))
    assert len(pieces) > 1
    assert f"{pieces[0]}: 0.0 MiB" in capsys.readouterr().out
    assert {entry.name for entry in packed.iterdir()} == {*(piece.name for piece in pieces), transfers.MANIFEST}
    late = pieces[-1].rename(packed.parent / "late")
    assert rehearse(packed, "work", "--budget", "-1") == 1
    assert f"{pieces[-1].name}/rows.tar did not come yet" in capsys.readouterr().err
    late.rename(pieces[-1])
    assert rehearse(packed, "work", "--budget", "-1") == 1
    assert "not reached: cola-s0" in capsys.readouterr().out
    place = packed.parent / "work" / "packed"
    assert {file.relative_to(place): file.read_bytes() for file in place.rglob("*") if file.is_file()} == whole


def test_unknown_tasks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert glue_rows.main(["pack", "--tasks", "rte", "--out", str(tmp_path / "packed")]) == 1
    assert "give NAME, or NAME:RATE:EPOCHS" in capsys.readouterr().err


# The fake accelerator


@pytest.mark.slow
def test_the_fake_accelerator_trains_a_step_and_punishes_a_cpu_tensor(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here (g++)")
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "tools.gpu.fake_accelerator", "--step", "--out", str(file)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "failed:" in child.stderr:
        pytest.skip(f"the extension cannot be compiled here: {child.stderr.strip().splitlines()[-1]}")
    assert child.returncode == 0, child.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["error"] is None
    assert report["metrics"]["moved"] > 0
    assert report["events"]["mismatch in aten::addmm: elsewhere"] == 1


# TensorRT 8.6


@pytest.fixture
def carried(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of chunks of 100 bytes with small stand-ins for the members, and a place to put them together."""
    wheel, packed = tmp_path / "wheel", tmp_path / "packed"
    wheel.mkdir()
    packed.mkdir()
    base = tmp_path / "base"
    (base / "py").mkdir(parents=True)
    (base / "py" / "hello").write_text("hello", encoding="utf-8")
    with tarfile.open(tmp_path / "base.tar", "w") as archive:
        archive.add(base / "py", "py")
    members = [("base", tmp_path / "base.tar")]
    for number, name in enumerate(LIBRARIES):
        (wheel / name).write_bytes(np.random.default_rng(number).bytes(150))
        members.append((name, wheel / name))
    for name, file in members:
        (packed / f"{name}.xz").write_bytes(lzma.compress(file.read_bytes()))
    pack.cut([(name, packed / f"{name}.xz") for name, _ in members], wheel, tmp_path / "folder", chunk_bytes=100)
    return tmp_path / "folder", tmp_path / "place"


def test_chunks_are_put_together_whatever_their_order(carried: tuple[Path, Path], tmp_path: Path) -> None:
    folder, place = carried
    manifest = Manifest.read(folder / "manifest.json")
    names = [chunk.name for chunk in manifest.chunks]
    assert len(names) > 5
    options = ["--folder", str(folder), "--place", str(place)]
    for name in reversed(names[1:]):
        assert unpack.main([name, *options]) == 2, "something is missing"
    assert not (place / "py").exists()
    assert unpack.main([names[0], *options]) == 0
    assert (place / "py" / "hello").read_text(encoding="utf-8") == "hello"
    for name in LIBRARIES:
        assert (place / "trt" / "tensorrt" / name).read_bytes() == (tmp_path / "wheel" / name).read_bytes()
    launcher = subprocess.run(["sh", "-n", str(place / "python310")], capture_output=True, text=True, check=False)
    assert launcher.returncode == 0, launcher.stderr


def test_the_page_of_tensorrt_has_every_engine_and_what_failed(tmp_path: Path) -> None:
    assert evidence86.write_report(tmp_path) is None
    timings = (Timing("int8-dense", 1, 8, 2.0, (2.0, 2.0), 9), Timing("int8-sparse", 1, 8, 1.0, (1.0, 1.0), 9))
    ratio = Speedup("int8-sparse", "int8-dense", 1, 8, 2.0, (1.9, 2.1))
    made = engines86.EngineOutcome(12.5, 9, 0.5, {"sparse": 3}, ["kernel"], {"logits": 0.0125})
    steps = [
        engines86.StepOutcome("minilm", {"int8-sparse": made}, BenchReport(timings, (ratio,))),
        engines86.StepOutcome("bert", {"fp16": engines86.EngineOutcome(errors=["no builder"])}, None, ["no time"]),
    ]
    report = engines86.Report(tensorrt="8.6.0", device={"gpu": "NVIDIA H200", "cuda": "13.0"}, steps=steps)
    (tmp_path / "engines.json").write_text(json.dumps(asdict(report)), encoding="utf-8")
    page = evidence86.write_report(tmp_path)
    assert page is not None
    assert page.name == "nvidia-h200-tensorrt86.md"
    text = page.read_text(encoding="utf-8")
    for line in (
        "| TensorRT | 8.6.0 |",
        "| minilm | int8-sparse | 12.5 | 50.0% | 3 sparse | logits 0.0125 |",
        "| minilm | 1x8 | int8-sparse | 1.0000 | 2.00 (1.90 to 2.10) |",
        "- bert: no time",
        "- bert fp16: no builder",
    ):
        assert line in text.splitlines()


def test_a_damaged_chunk_is_refused(carried: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, place = carried
    (folder / "c02" / "part").write_bytes(b"x" * 100)
    assert unpack.main(["c02", "--folder", str(folder), "--place", str(place)]) == 1
    assert "chunk c02 is not what was sent" in capsys.readouterr().err
    assert unpack.main(["c99", "--folder", str(folder), "--place", str(place)]) == 1
    assert "there is no chunk c99" in capsys.readouterr().err


def test_a_wheel_that_is_not_what_its_record_says_is_refused(tmp_path: Path) -> None:
    info = tmp_path / f"tensorrt-{VERSION}.dist-info"
    info.mkdir()
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "a.so").write_bytes(b"good")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"good").digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"tensorrt/a.so,sha256={digest},4\n", encoding="utf-8")
    pack.verify(tmp_path)
    (tmp_path / "tensorrt" / "a.so").write_bytes(b"evil")
    with pytest.raises(pack.CannotPack, match=r"tensorrt/a\.so is not what"):
        pack.verify(tmp_path)
