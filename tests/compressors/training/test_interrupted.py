"""A run that is killed and resumed, and what it leaves to others."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.errors import ArtifactError
from tests.support.trained import FAST, run


@pytest.mark.slow
def test_what_a_run_with_another_plan_left_behind_is_not_used(prepared: Path, tmp_path: Path) -> None:
    def interrupted(phase: str, done: int, steps: int) -> None:
        if phase == "qat":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(prepared, tmp_path / "checkpoint", "1:4+W8", recipe="nxm", progress=interrupted)
    assert list((tmp_path / ".checkpoint.work").glob("admm*.safetensors"))  # a finished phase, of the other plan
    metrics = run(prepared, tmp_path / "checkpoint", "2:4+W8", recipe="nxm")
    assert metrics.mask_hash == run(prepared, tmp_path / "alone", "2:4+W8", recipe="nxm").mask_hash


SCRIPT = """
import json, os, signal, sys
from compressors.training.compress import compress
from compressors.settings import Settings
from compressors.models import resolve
from nxm_export.contract.plan import WeightSpec

prepared, out, settings, moment = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]

def progress(what, done, total):
    print(what, done, flush=True)
    if f"{what} {done}" == moment:
        os.kill(os.getpid(), signal.SIGKILL)

source = resolve(prepared + "/dense")
metrics = compress(
    prepared + "/dense", task="classification", train=prepared + "/train.tsv", dev=prepared + "/dev.tsv",
    plan=source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W4")), out=out, settings=Settings(**settings),
    progress=progress,
)
print(json.dumps(metrics.to_dict()))
"""


def start(prepared: Path, out: Path, recipe: str = "nxm", moment: str = "never") -> subprocess.Popen[str]:
    """A compression in a process of its own, which kills itself (-9) at a moment."""
    settings = {**FAST, "recipe": recipe, "steps": 60, "batch_size": 8, "dual_updates": 6}
    command = [sys.executable, "-c", SCRIPT, str(prepared), str(out), json.dumps(settings), moment]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    recipe: str
    checkpoint: Path
    metrics: dict[str, object]


@pytest.fixture(scope="module")
def whole(prepared: Path, request: pytest.FixtureRequest) -> Whole:
    """One by the recipe that a test names."""
    checkpoint = prepared / f"whole-{request.param}"
    stdout, stderr = start(prepared, checkpoint, request.param).communicate(timeout=300)
    assert stdout.strip(), stderr
    return Whole(request.param, checkpoint, json.loads(stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whole", "moment", "first"),
    [
        ("nxm", "admm 15", None),
        ("nxm", "qat 20", None),
        ("admm", "solve 9", 7),  # inside the second block, of which no layer is kept; the first has six
        ("admm", "qat 20", None),
    ],
    indirect=["whole"],
)
def test_killed_and_resumed_gives_what_an_uninterrupted_run_gives(
    prepared: Path, whole: Whole, tmp_path: Path, moment: str, first: int | None
) -> None:
    child = start(prepared, tmp_path / "killed", whole.recipe, moment)
    _, stderr = child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL, stderr
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.work").is_dir()

    again = start(prepared, tmp_path / "killed", whole.recipe)
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    phase = moment.split()[0]
    done = [int(line.split()[1]) for line in stdout.splitlines() if line.startswith(f"{phase} ")]
    assert done[0] > 0 if first is None else done[0] == first  # it went on, it did not start again
    again_done = ("calibrate", "outputs", *(["solve"] if phase == "qat" else []))
    assert not [line for line in stdout.splitlines() if line.startswith(again_done)]  # nor measured or solved again
    resumed = json.loads(stdout.splitlines()[-1])
    assert resumed == whole.metrics
    for name in ("model.safetensors", "nxm_scales.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole.checkpoint / name).read_bytes()
    lines, uninterrupted = (
        [json.loads(line) for line in (checkpoint / "train_log.jsonl").read_text().splitlines()]
        for checkpoint in (tmp_path / "killed", whole.checkpoint)
    )
    assert [line for line in lines if "residual" in line] == [line for line in uninterrupted if "residual" in line]
    assert len({(line["phase"], line["step"], "residual" in line) for line in lines}) == len(lines)  # nothing twice
    assert not (tmp_path / ".killed.work").exists()


@pytest.mark.slow
def test_saving_takes_place_often_enough_to_matter(prepared: Path, tmp_path: Path) -> None:
    """A tenth of a phase is the most that a kill can cost."""
    child = start(prepared, tmp_path / "out")
    assert child.stdout is not None
    seen: list[str] = []
    for line in child.stdout:
        if line.startswith("admm"):
            seen += [path.name for path in (tmp_path / ".out.work" / "admm").glob("checkpoint-*")]
        if line.startswith("qat"):
            break
    child.kill()
    child.wait()
    assert len(set(seen)) >= 5


def test_of_two_into_one_directory_the_second_is_refused_and_the_first_goes_on(prepared: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def meanwhile(what: str, done: int, total: int) -> None:
        if what == "qat" and not refused:
            work = sorted(path.name for path in (tmp_path / ".checkpoint.work").iterdir())
            with pytest.raises(ArtifactError, match="is being written by another nxm process") as caught:
                run(prepared, tmp_path / "checkpoint", steps=4)
            refused.append(str(caught.value))
            assert sorted(path.name for path in (tmp_path / ".checkpoint.work").iterdir()) == work

    run(prepared, tmp_path / "checkpoint", steps=4, progress=meanwhile)
    assert refused
    open_checkpoint(tmp_path / "checkpoint").require_valid()
    (tmp_path / ".checkpoint.partial").mkdir()  # of a process that is dead, whose lock the kernel took back
    run(prepared, tmp_path / "checkpoint", steps=4)
