"""`nxm run` from outside: one JSON object, stages that are skipped when up to date, kill -9 and resume."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from compressors.settings import Settings
from compressors.training.task_data import TaskDataRequest
from engines.base import Profile
from engines.cusparselt import backend as cusparselt
from engines.cusparselt import machine as machines
from engines.cusparselt.machine import Machine
from nxm_export.contract.checkpoint import float32_bytes, open_checkpoint
from nxm_export.contract.families import FAMILIES, family_of
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, read_metrics_of
from nxm_export.contract.records.run_summary import SCHEMA, RunSummary
from nxm_export.contract.records.verify_report import read_verify_report
from nxm_export.errors import Notice
from nxm_export.graph import exporter
from nxm_export.pipeline.estimate import passes_before_training
from nxm_export.pipeline.request import Request
from nxm_export.pipeline.run import _export, _more_text
from nxm_export.pipeline.run_engines import GRAPHS
from nxm_export.progress import silent
from nxm_export.storage.json_files import decode, entry_at
from nxm_export.storage.run_dir import RunDir
from tests.engines.cusparselt.machines import FACTS, FASTER, Priced
from tests.support import tiny
from tests.support.few_rounds import time_few_rounds_here
from tests.support.run_desk import Desk, refused
from tests.support.variants import variants

Finished = tuple[Path, dict[str, object], str]


@pytest.fixture(scope="module")
def finished(desk: Desk) -> Finished:
    """(run directory, what --json printed, what stood on stderr)"""
    out = desk.home / "run"
    process = desk.start(*desk.arguments(out, "--json"))
    printed, complaints = process.communicate()
    assert process.returncode == 0, complaints
    return out, json.loads(printed), complaints


def states(run: Path) -> dict[str, int]:
    """When every file of a run was written, but for those that a command leaves about itself."""
    return {str(file.relative_to(run)): file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}


def test_the_json_has_what_scripts_need(desk: Desk, finished: Finished) -> None:
    run, summary, _ = finished
    assert summary["metric"] == "accuracy"
    assert summary["dev_samples"] == tiny.DEV_SAMPLES
    made = decode(json.dumps(summary), RunSummary, schema=SCHEMA, source="--json", way_out="run again")
    assert made.compressed is not None
    assert 0.5 < made.compressed <= 1
    assert made.dense is not None
    assert 0.5 < made.dense <= 1
    assert made.one_class is not None
    labels = [line.rsplit("\t", 1)[1] for line in desk.dev.read_text(encoding="utf-8").splitlines()[1:]]
    assert made.one_class.value == max(map(labels.count, labels)) / len(labels)
    assert made.one_class.dense_is_better
    assert set(made.compression) >= {"values", "packed", "hw"}
    assert made.compression["values"] == 0.875  # half of the weights, a quarter of the bits
    for report in made.parity.values():
        assert report.agreement is not None
        assert report.agreement >= 0.9
        assert report.max_abs is not None
        assert report.max_abs >= 0
    for timing in made.latency_ms.values():
        assert timing.median > 0
        assert (timing.batch, timing.seq) > (0, 0)
    assert all(Path(path).exists() for path in made.artifacts.values())
    assert {Path(path).is_relative_to(run) for path in made.artifacts.values()} == {True}


def test_json_means_no_progress_and_no_chatter_of_libraries(finished: Finished) -> None:
    said = finished[2].splitlines()
    assert len(said) == 1, "its head is made anew, which is said"
    assert "it has no classification head, and a new classification head is trained" in said[0]


def test_run_again_skips_everything_and_says_the_same(desk: Desk, finished: Finished) -> None:
    run, summary, _ = finished
    before = states(run)
    again = desk.nxm(*desk.arguments(run, "--json"))
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == summary
    changed = {file for file, when in states(run).items() if before.get(file) != when}
    assert not {file for file in changed if Path(file).parts[0] not in ("logs", "run.log", ".lock")}, changed


def test_a_run_that_other_versions_began_says_so_and_compares_again(
    desk: Desk, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_few_rounds_here(monkeypatch)
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in ("dense", "compress", "compare ort-cpu-int8"):
        manifest["stages"][stage]["versions"]["torch"] = "0.1"
    (run / "manifest.json").write_text(json.dumps(manifest))
    before = states(run)
    again = desk.nxm(*desk.arguments(run))
    assert again.exit_code == 0, again.output
    assert f"Versions differ: dense, compress made by torch 0.1 (now {version('torch')})." in again.stdout
    after = states(run)
    changed = {file.rpartition("/")[0] for file in before if after.get(file) != before[file]}
    assert {"compare/ort-cpu-int8"} <= changed
    assert not {"dense", "checkpoint", "onnx/cpu", "compare/ort-cpu-fp32"} & changed
    shown = desk.nxm("show", str(run), "--json")
    assert json.loads(shown.stdout)["other_versions"] == {"dense": {"torch": "0.1"}, "compress": {"torch": "0.1"}}
    assert desk.nxm("report", str(run)).exit_code == 0
    assert "made by different versions of torch" in (run / "report.html").read_text()


def test_run_again_keeps_a_later_comparison_that_failed_and_fails_with_it(
    desk: Desk, finished: Finished, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    engine = run / "engines" / "ort-cpu-int8"
    gate = ("--gate=max_abs<=0", f"--checkpoint={run / 'checkpoint'}", f"--data={desk.train}")
    assert desk.nxm("compare", str(engine), *gate).exit_code == 3
    found = (engine / "parity.json").read_bytes()
    again = desk.nxm(*desk.arguments(run))
    assert again.exit_code == 3, again.output
    assert f"parity failed for ort-cpu-int8: see {engine / 'parity.json'}" in again.stderr
    assert "nxm serve" not in again.output
    assert (engine / "parity.json").read_bytes() == found, "what somebody found is not written over"
    assert desk.nxm("compare", str(engine), *gate[1:]).exit_code == 0
    assert desk.nxm(*desk.arguments(run)).exit_code == 0


def test_a_moved_run_shows_its_table_from_where_it_lies(desk: Desk, finished: Finished, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished[0], moved)
    shown = desk.nxm("show", str(moved), "--json")
    assert shown.exit_code == 0
    summary = json.loads(shown.stdout)
    assert {Path(path).is_relative_to(moved) for path in summary["artifacts"].values()} == {True}
    assert summary["compressed"] == finished[1]["compressed"]


@pytest.mark.slow
def test_other_options_are_worked_out_again_from_the_stage_that_they_touch(
    desk: Desk, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_few_rounds_here(monkeypatch)
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = states(run)
    result = desk.nxm(*desk.arguments(run, "--json", "--weight-bits=4"))
    assert result.exit_code == 0, result.output
    summary, after = json.loads(result.stdout), states(run)
    assert summary["compression"]["values"] == 0.9375
    assert summary["dense"] == finished[1]["dense"]
    untouched = {file for file in before if file.startswith("dense/")}
    assert untouched
    assert {file for file in untouched if after[file] != before[file]} == set()
    assert after["checkpoint/model.safetensors"] != before["checkpoint/model.safetensors"]


@pytest.mark.parametrize(("stage", "output", "kept"), [("dense", "dense", False), ("compress", "checkpoint", True)])
def test_a_run_that_stops_behind_a_new_model_shows_nothing_of_the_old_one(
    desk: Desk, finished: Finished, tmp_path: Path, stage: str, output: str, kept: bool
) -> None:
    """`kept`: what was made of the dense model is not touched."""
    shutil.copytree(finished[0], tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    run.stage(stage, output, lambda scratch: (scratch / "new").touch())
    of_dense = {"export dense", "build ort-cpu-fp32", "compare ort-cpu-fp32"} if kept else set[str]()
    assert {*run.manifest.stages} == {"dense", stage} | of_dense
    assert sorted(engine.name for engine in run.root.glob("engines/*")) == (["ort-cpu-fp32"] if kept else [])
    refused(desk.nxm("show", str(run.root)), "this run has no summary yet; run the same `nxm run` again")


@pytest.mark.parametrize(
    "rounds", [pytest.param("few", marks=pytest.mark.slow), pytest.param("all", marks=pytest.mark.exhaustive)]
)
def test_auto_keeps_the_fastest_of_this_machine(
    desk: Desk, finished: Finished, tmp_path: Path, rounds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained again; what a GPU took in the run before goes away, as auto has what runs here alone."""
    if rounds == "few":
        time_few_rounds_here(monkeypatch)
    pytest.importorskip("openvino", reason="OpenVINO is not installed; pip install 'nxm-export[openvino]'")
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = states(run)
    result = desk.nxm(*desk.arguments(run, "--json", "--backend=auto"))
    assert result.exit_code == 0, result.output
    summary = decode(result.stdout, RunSummary, schema=SCHEMA, source="--json", way_out="run again")
    assert {*summary.parity} == {"ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int8-outputs", "openvino-cpu-int8"}
    assert summary.chosen is not None
    assert summary.chosen.name == f"{summary.chosen.backend}-cpu-int8"
    assert "left out: trt" in summary.chosen.why
    assert summary.compressed == summary.parity[summary.chosen.name].value
    assert {ratio.name for ratio in summary.speedup} >= {"ort-cpu-int8", "openvino-cpu-int8"}
    assert not (run / "onnx" / "trt").exists()
    assert {file: when for file, when in states(run).items() if file.startswith("checkpoint/")} == {
        file: when for file, when in before.items() if file.startswith("checkpoint/")
    }
    shown = desk.nxm("show", str(run)).stdout
    assert f"Kept: {summary.chosen.name}." in " ".join(shown.split())
    page = desk.nxm("report", str(run))
    assert page.exit_code == 0, page.output
    assert f"backend {summary.chosen.backend} was kept" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_gpu_s_run_builds_compares_and_times_its_twins(
    desk: Desk, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stand-in of the GPU's products, in this process."""
    monkeypatch.setattr(cusparselt, "this_machine", lambda: Machine(Priced(2.0, FASTER), FACTS))
    monkeypatch.setattr(machines, "what_is_missing", lambda: None)
    monkeypatch.setattr(cusparselt, "profiles_for", lambda *_: (Profile((1, 1), (2, 8), (32, 48)),))
    time_few_rounds_here(monkeypatch)
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    result = desk.nxm(*desk.arguments(run, "--json", "--backend=cusparselt"))
    assert result.exit_code == 0, result.output
    summary = decode(result.stdout, RunSummary, schema=SCHEMA, source="--json", way_out="run again")
    twins = ["cusparselt-fp16-int8-dense", "cusparselt-fp16-int8", "cusparselt-fp16-float"]
    assert list(summary.parity) == ["ort-cpu-fp32", *twins]
    assert all(report.passed for report in summary.parity.values())
    assert summary.chosen is not None
    assert (summary.chosen.name, summary.chosen.backend) == (twins[1], "cusparselt")
    unprofiled = f"no verdict: which kernels {run / 'engines' / twins[1]} runs is not known (profile it with "
    assert summary.sparse_verdicts["cusparselt"].startswith(unprofiled)
    assert {ratio.reference for ratio in summary.speedup if ratio.name in twins} == {twins[0]}
    shown = desk.nxm("show", str(run), "--all").stdout
    assert "2:4 on cusparselt: no verdict: which kernels" in " ".join(shown.split())


@pytest.mark.slow
def test_a_placement_that_no_graph_with_outputs_can_hold_leaves_that_engine_out(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_few_rounds_here(monkeypatch)
    run = tmp_path / "run"
    result = desk.nxm(*desk.arguments(run, "--json", "--placement=products", "--steps=4"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (run / "onnx").iterdir()) == ["cpu", "dense", "trt"]
    made = {path.name for path in (run / "engines").iterdir()}
    assert {"ort-cpu-fp32", "ort-cpu-int8"} <= made
    assert "ort-cpu-int8-outputs" not in made
    assert min(report["agreement"] for report in json.loads(result.stdout)["parity"].values()) >= 0.9


@pytest.mark.slow
def test_weights_of_4_bits_are_stored_so_where_the_target_can(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time_few_rounds_here(monkeypatch)
    run = tmp_path / "run"
    result = desk.nxm(*desk.arguments(run, "--json", "--weight-bits=4", "--weights-stored=int4", "--steps=4"))
    assert result.exit_code == 0, result.output
    stored = {}
    for graph in (run / "onnx").iterdir():
        reported = read_verify_report(graph / "verify.json").weights
        stored[graph.name] = {weight.stored for weight in reported if weight.planned}
    assert stored == {"dense": set(), "cpu": {"INT4"}, "cpu-outputs": {"INT4"}, "trt": {"INT8"}}
    assert "onnx/trt keeps its weights in INT8" in result.stderr
    again = desk.nxm(*desk.arguments(run, "--json", "--weight-bits=4", "--steps=4"))
    assert again.exit_code == 0, again.output
    assert {weight.stored for weight in read_verify_report(run / "onnx" / "cpu" / "verify.json").weights} >= {"INT8"}


@pytest.mark.parametrize("mark", variants(["qat", "dense"], ("qat",)))
def test_killed_and_run_again_it_ends_as_if_nothing_had_happened(
    desk: Desk, finished: Finished, tmp_path: Path, mark: str
) -> None:
    run = tmp_path / "run"
    if mark == "qat":  # the dense model is there: only compression is killed
        shutil.copytree(finished[0], run)
        shutil.rmtree(run / "checkpoint")
    process = desk.start(*desk.arguments(run, "--json"))
    _wait(lambda: any(run.rglob("checkpoint-*")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "checkpoint").exists()
    again = desk.nxm(*desk.arguments(run, "--json"))
    assert again.exit_code == 0, again.output
    summary = json.loads(again.stdout)
    expected = finished[1]
    assert (summary["dense"], summary["compressed"]) == (expected["dense"], expected["compressed"])
    checkpoints = [str(entry_at(s, "artifacts", "checkpoint")) for s in (summary, expected)]
    masks = [read_metrics_of(CompressionMetrics, checkpoint) for checkpoint in checkpoints]
    assert masks[0].mask_hash == masks[1].mask_hash


def test_two_runs_into_one_directory_do_not_mix(desk: Desk, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = desk.start(*desk.arguments(run, "--json"))
    _wait(lambda: any(run.rglob("checkpoint-*")) or first.poll() is not None)
    second = desk.nxm(*desk.arguments(run))
    first.kill()
    first.communicate()
    assert second.exit_code == 1
    assert "another" in second.output


def test_a_dry_run_counts_half_a_byte_for_a_weight_of_4_bits(desk: Desk, tmp_path: Path) -> None:
    sizes = []
    for stored in ("int8", "int4"):
        options = ("--weight-bits=4", f"--weights-stored={stored}", "--dry-run", "--json")
        result = desk.nxm(*desk.arguments(tmp_path / "run", *options))
        assert result.exit_code == 0, result.output
        sizes.append(json.loads(result.stdout)["onnx_bytes"])
    hidden, wide = tiny.HIDDEN, tiny.INTERMEDIATE
    assert sizes[0] - sizes[1] == tiny.LAYERS * (4 * hidden**2 + 2 * hidden * wide) // 2


def test_dry_run_estimates_and_writes_nothing(desk: Desk, tmp_path: Path) -> None:
    result = desk.nxm(*desk.arguments(tmp_path / "run", "--dry-run", "--json"))
    assert result.exit_code == 0, result.output
    estimated = json.loads(result.stdout)
    assert estimated["search_seconds"] == 0
    assert estimated["max_length"] == tiny.POSITIONS
    assert estimated["engines"][:2] == ["ort-cpu-fp32", "ort-cpu-int8"]
    assert estimated["more_texts"] == 0
    assert list(tmp_path.iterdir()) == []


class _Compressed(Exception):
    """The checkpoint is there, and the stages behind it need not run."""


def test_more_text_is_counted_and_its_files_decide_what_is_made_again(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a film\nthe film\n")
    more = ("--more-text", str(texts), "--more-text-share=0.25")
    result = desk.nxm(*desk.arguments(tmp_path / "run", "--dry-run", "--json", *more))
    assert json.loads(result.stdout)["more_texts"] == 2
    requests: list[Request] = []

    def keep(request: Request, *_: object, **__: object) -> None:
        requests.append(request)
        raise _Compressed

    monkeypatch.setattr("nxm_export.pipeline.run.run", keep)
    assert isinstance(desk.nxm(*desk.arguments(tmp_path / "run", *more)).exception, _Compressed)
    assert _more_text(requests[0]) == ({"more text 1": texts}, {"more_text_share": 0.25})
    assert _more_text(replace(requests[0], more_text=None)) == ({}, {})


def test_the_estimate_counts_what_comes_before_the_first_step() -> None:
    """In forward passes of a sample: calibration, two outputs a block that are left out in turn, masks."""
    config = transformers.BertConfig(num_hidden_layers=12, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    family = family_of(config.to_dict(), source="test")
    plan = family.uniform_plan(config.to_dict(), WeightSpec.parse("2:4+W8"), placement="inputs-outputs")
    calibration, outputs, masks = 512 * 1.5, 25 * 128 * 1.3, 512 * 13.0
    assert passes_before_training(Settings(), plan, 10000) == calibration + outputs + masks
    assert passes_before_training(Settings(recipe="obs"), plan, 10000) == calibration + outputs + 512 * 6.0
    assert passes_before_training(Settings(output_limit=None), plan, 10000) == calibration + masks
    assert passes_before_training(Settings(recipe="magnitude", output_limit=None), plan, 100) == 100 * 1.5
    assert passes_before_training(Settings(recipe="magnitude", steps=0), plan, 10000) == 2 * calibration + outputs
    inputs = family.uniform_plan(config.to_dict(), WeightSpec.parse("2:4+W8"), placement="inputs")
    assert passes_before_training(Settings(), inputs, 10000) == calibration + masks
    modern = FAMILIES["modernbert"].uniform_plan(config.to_dict(), WeightSpec.parse("2:4+W8"))
    four_a_block = (12 * 4 + 1) * 128 * 1.3  # what is rotated and what is gated, too
    assert passes_before_training(Settings(), modern, 10000) == calibration + four_a_block + masks


def test_a_search_in_a_run_takes_no_more_samples_than_training(
    desk: Desk, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads the data is asked for as many; nothing is trained or written."""
    limits: list[int | None] = []

    def read(_: object, request: TaskDataRequest, *__: object) -> None:
        limits.append(request.train_limit)
        raise _Compressed

    monkeypatch.setattr("nxm_export.pipeline.run._finetune", lambda *_: None)
    monkeypatch.setattr("compressors.search.plan_search.read_task_data", read)
    result = desk.nxm(*desk.arguments(finished[0], "--search=0.8", "--train-limit=100"))
    assert isinstance(result.exception, _Compressed), result.output
    alone = ("search", str(finished[0] / "dense"), f"--train={desk.train}", f"--out={desk.home / 'searched'}")
    assert isinstance(desk.nxm(*alone, "--train-limit=64").exception, _Compressed)
    assert limits == [100, 64]


@pytest.mark.slow
def test_a_run_searches_its_plan_and_another_takes_it_from_a_file(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enough(*_: object) -> None:
        raise _Compressed

    monkeypatch.setattr("nxm_export.pipeline.run._export", enough)
    result = desk.nxm(*desk.arguments(tmp_path / "searched", "--search=0.8", "--dry-run"))
    assert result.exit_code == 0, result.output
    short = ("--dense-steps=2", "--steps=2")
    result = desk.nxm(*desk.arguments(tmp_path / "searched", "--search=0.8", *short))
    assert isinstance(result.exception, _Compressed), result.output
    plan = tmp_path / "searched" / "search" / "plan.json"
    searched = CompressionPlan.load(plan)
    assert searched.compression("hw") >= 0.8
    assert open_checkpoint(tmp_path / "searched" / "checkpoint").plan.weights.keys() == searched.weights.keys()
    chosen = replace(searched, weights=dict.fromkeys(searched.weights, WeightSpec.parse("1:4+W4")))
    (tmp_path / "mine.json").write_text(chosen.to_json())
    result = desk.nxm(
        *desk.arguments(tmp_path / "planned", f"--plan={tmp_path / 'mine.json'}", "--output-limit=inf", *short)
    )
    assert isinstance(result.exception, _Compressed), result.output
    assert open_checkpoint(tmp_path / "planned" / "checkpoint").plan == chosen
    estimated = desk.nxm(*desk.arguments(tmp_path / "x", f"--plan={tmp_path / 'mine.json'}", "--dry-run", "--json"))
    assert json.loads(estimated.stdout)["plan"] == chosen.pattern_counts
    (tmp_path / "wrong.json").write_text(replace(chosen, model_type="roberta").to_json())
    refused(desk.nxm(*desk.arguments(tmp_path / "x", f"--plan={tmp_path / 'wrong.json'}")), "roberta")


@pytest.mark.parametrize("dry", [False, True])
def test_a_directory_of_something_else_is_refused_before_anything_is_trained(
    desk: Desk, tmp_path: Path, dry: bool
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    result = desk.nxm(*desk.arguments(tmp_path / "mine", *(["--dry-run"] if dry else [])))
    refused(result, "exists and is not a run directory")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_weights_in_half_precision_count_as_they_are_trained(desk: Desk, tmp_path: Path) -> None:
    halved = tmp_path / "halved"
    shutil.copytree(desk.model, halved)
    weights = {name: tensor.astype(np.float16) for name, tensor in load_file(halved / "model.safetensors").items()}
    save_file(weights, halved / "model.safetensors")
    assert float32_bytes(halved) == float32_bytes(desk.model) == 4 * sum(tensor.size for tensor in weights.values())


def test_attention_beyond_512_tokens_is_exported_in_float_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny.compress_tiny("bert", tmp_path, placement="attention", steps=2, dense_steps=2)
    monkeypatch.setattr(exporter, "INT8_ATTENTION_TOKENS", 16)
    directory = RunDir(tmp_path / "run")
    shutil.copytree(checkpoint, directory.path("checkpoint"))
    request = Request("m", "classification", "t", "d", WeightSpec(), Settings())
    plan = open_checkpoint(checkpoint).plan
    with pytest.warns(Notice, match=r"onnx/trt computes attention in float: INT8 attention is for at most 16 tokens"):
        assert _export(directory, request, plan, {"trt": GRAPHS["trt"]}, silent) == ["trt"]


def test_an_engine_of_another_checkpoint_fails_the_gate(desk: Desk, finished: Finished, tmp_path: Path) -> None:
    """The same plan, one scale doubled: the engine is not what this checkpoint says."""
    from safetensors.numpy import load_file, save_file

    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    shutil.copytree(finished[0] / "checkpoint", checkpoint)
    shutil.copytree(finished[0] / "engines" / "ort-cpu-int8", engine)
    scales = load_file(checkpoint / "nxm_scales.safetensors")
    name = "bert.encoder.layer.1.output.dense.input_scale"
    scales[name] = np.asarray(scales[name] * 2)
    save_file(scales, checkpoint / "nxm_scales.safetensors")
    result = desk.nxm("compare", str(engine), f"--checkpoint={checkpoint}", f"--data={desk.dev}")
    assert result.exit_code == 3, result.output
    assert (
        desk.nxm("compare", str(engine), f"--data={desk.dev}", f"--checkpoint={finished[0] / 'checkpoint'}").exit_code
        == 0
    )


def _wait(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing was saved in time"
        time.sleep(0.05)
