"""Training on a GPU against the CPU, rehearsed; a step on the fake accelerator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tools import ROOT
from tools.gpu import training_probe, transfers


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
