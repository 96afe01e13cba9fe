"""A run that is killed and resumed, and what it leaves to others."""

import json
import os
import signal
import subprocess
import sys
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
import json, sys
from compressors.training.compress import compress
from compressors.settings import Settings
from compressors.models import resolve
from nxm_export.contract.plan import WeightSpec

prepared, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
source = resolve(prepared + "/dense")
metrics = compress(
    prepared + "/dense", task="classification", train=prepared + "/train.tsv", dev=prepared + "/dev.tsv",
    plan=source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W4")), out=out, settings=Settings(**settings),
    progress=lambda what, done, total: print(what, done, flush=True),
)
print(json.dumps(metrics.to_dict()))
"""


def start(prepared: Path, out: Path) -> subprocess.Popen[str]:
    settings = {**FAST, "recipe": "nxm", "steps": 60, "batch_size": 8, "dual_updates": 6}
    command = [sys.executable, "-c", SCRIPT, str(prepared), str(out), json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.fixture(scope="module")
def whole(prepared: Path) -> tuple[Path, dict[str, object]]:
    """(checkpoint, metrics) of an uninterrupted run."""
    stdout, stderr = start(prepared, prepared / "whole").communicate(timeout=300)
    assert stdout.strip(), stderr
    return prepared / "whole", json.loads(stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["admm 15", "qat 20"])
def test_killed_and_resumed_gives_what_an_uninterrupted_run_gives(
    prepared: Path, whole: tuple[Path, dict[str, object]], tmp_path: Path, moment: str
) -> None:
    child = start(prepared, tmp_path / "killed")
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == moment:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.work").is_dir()

    again = start(prepared, tmp_path / "killed")
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    first = next(line for line in stdout.splitlines() if line.startswith(moment.split()[0]))
    assert int(first.split()[1]) > 0  # it went on, it did not start again
    assert not [line for line in stdout.splitlines() if line.startswith(("calibrate", "outputs"))]  # nor measured again
    resumed = json.loads(stdout.splitlines()[-1])
    assert resumed["mask_hash"] == whole[1]["mask_hash"]
    assert resumed["value"] == whole[1]["value"]
    for name in ("model.safetensors", "nxm_scales.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole[0] / name).read_bytes()
    lines, uninterrupted = (
        [json.loads(line) for line in (checkpoint / "train_log.jsonl").read_text().splitlines()]
        for checkpoint in (tmp_path / "killed", whole[0])
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
