"""Training on a device that is no CPU to torch: nothing of it may be left on the host, and no step may wait without
need."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from compressors.settings import RECIPES
from tests.support import tiny
from tools import ROOT

pytestmark = pytest.mark.slow
ALIKE = pytest.mark.exhaustive  # goes the way of another
TRAINED = [recipe for recipe in RECIPES if recipe != "one-shot"]

# Lines of ours at which each step waits for the device, and why it must. The Trainer's and transformers' own waits show
# as the line that calls them.
NEEDED = {
    "rows = attention_mask.flatten().nonzero().squeeze(-1)": "how many tokens are real decides shapes",
    "if self.losses.task == 0 or not labels:": "without any label the task's loss is 0 / 0",
    "output: TaskOutput = self._teacher[0](**inputs, output_hidden_states=deep)": "transformers makes a mask",
    "output = self.model(**batch, output_hidden_states=deep)": "transformers makes a mask",
    "if torch.equal(error, before):": "scales are fitted, where masks are fixed: not at each step",
    "trainer.train(resume_from_checkpoint=str(resume) if resume else None)": "the Trainer, and checkpoints",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished `nxm run` has of a tokenizer and of data."""
    out = tmp_path_factory.mktemp("run")
    tiny.write_model("bert", out / "dense")
    (out / "data").mkdir()
    tiny.write_data(out / "data")
    return out


@dataclass(frozen=True)
class Report:
    """What a rehearsal says: its metrics, and how often each line of ours waited."""

    metrics: Mapping[str, object]
    waits: Mapping[str, int]


def rehearse(run: Path, folder: Path, *options: str) -> Report:
    """A rehearsal in a process of its own; it ends without an error."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here (g++)")
    file = folder / "report.json"
    command = [sys.executable, "-m", "tools.gpu.fake_accelerator", str(run), *options, "--out", str(file)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "failed:" in child.stderr:
        pytest.skip(f"the extension cannot be compiled here: {child.stderr.strip().splitlines()[-1]}")
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["error"] is None, report["trace"]
    assert not any(event.startswith("mismatch") for event in report["events"])
    waits: dict[str, int] = {}
    for event, count in report["events"].items():
        kind, _, place = event.partition(": ")
        if kind != "copy to the device":
            line = re.sub(r"^\S+  ", "", place)
            waits[line] = waits.get(line, 0) + count
    return Report(report["metrics"], waits)


@pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=ALIKE if recipe == "magnitude" else ()) for recipe in TRAINED]
)
def test_every_recipe_trains_to_the_end(recipe: str, run: Path, tmp_path: Path) -> None:
    """`magnitude` is trained below, in both precisions."""
    report = rehearse(run, tmp_path, "--recipe", recipe, "--steps", "6")
    assert report.metrics["steps"] == 6


@pytest.mark.parametrize("options", [("--recipe", "admm"), ("--recipe", "one-shot", "--permute")])
def test_a_compression_without_training_happens_there_too(options: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    report = rehearse(run, tmp_path, *options, "--steps", "0")
    assert report.metrics["steps"] == 0


def test_bfloat16_changes_what_is_trained_and_nothing_else(run: Path, tmp_path: Path) -> None:
    exact = rehearse(run, tmp_path, "--recipe", "magnitude", "--steps", "4")
    rounded = rehearse(run, tmp_path, "--recipe", "magnitude", "--steps", "4", "--precision", "bf16")
    assert rounded.metrics["weights"] != exact.metrics["weights"]
    assert rounded.metrics["mask_hash"] == exact.metrics["mask_hash"]


@pytest.mark.parametrize(
    ("recipe", "phase", "at", "precision"),
    [("admm", "qat", 7, "bf16"), ("nxm", "admm", 3, "bf16"), ("nxm", "qat", 4, "fp32")],  # a GPU's default is bf16
)
def test_an_interrupted_training_goes_on_to_the_same_weights(
    recipe: str, phase: str, at: int, precision: str, run: Path, tmp_path: Path
) -> None:
    stopping = ("--interrupt-phase", phase, "--interrupt-at", str(at), "--precision", precision)
    report = rehearse(run, tmp_path, "--recipe", recipe, "--steps", "12", *stopping)
    assert report.metrics["weights of the resumed"] == report.metrics["weights"]


@pytest.mark.parametrize(
    ("recipe", "precision"), [("admm", "bf16"), ("one-shot", "fp32"), pytest.param("obs", "fp32", marks=ALIKE)]
)
def test_a_search_happens_there_too(recipe: str, precision: str, run: Path, tmp_path: Path) -> None:
    report = rehearse(run, tmp_path, "--search", "--recipe", recipe, "--steps", "4", "--precision", precision)
    assert report.metrics["finalists"]


@pytest.mark.parametrize("recipe", ["admm", "nxm"])
def test_no_step_waits_for_the_device_but_where_it_must(recipe: str, run: Path, tmp_path: Path) -> None:
    few = rehearse(run, tmp_path, "--recipe", recipe, "--steps", "20")
    many = rehearse(run, tmp_path, "--recipe", recipe, "--steps", "40")
    grown = {line: many.waits[line] - few.waits.get(line, 0) for line in many.waits}
    each_step = {line for line, count in grown.items() if count >= 8}  # of `nxm`, two fifths of the steps find masks
    assert each_step <= set(NEEDED), {line: grown[line] for line in each_step - set(NEEDED)}
    for line, count in grown.items():
        if line in NEEDED and not line.startswith("trainer."):
            assert count <= 20, f"more than once a step: {line}"
