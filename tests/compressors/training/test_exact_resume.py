"""Interrupted training goes on only where that gives what an uninterrupted one gives; else what is there is refused,
and stays."""

from __future__ import annotations

import random
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from compressors.pruning.admm import Admm
from compressors.quantization.fake_quant import QuantLinear
from compressors.settings import Settings
from compressors.training import trainer
from compressors.training.admm_schedule import AdmmCallback
from compressors.training.augmentation import augmented
from compressors.training.callbacks import JsonLog
from compressors.training.compress import compress, finetune
from compressors.training.resume import MADE_BY_FILE, take_ownership
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.records.train_log import read_train_log
from nxm_export.errors import ArtifactError
from nxm_export.progress import Progress, silent
from tests.support import tiny

SETTINGS = Settings(dense_steps=4, steps=6, batch_size=8, precision="auto", recipe="nxm", calibration_samples=16)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a head, its data, and a compressed checkpoint."""
    return tiny.compress_tiny("bert", tmp_path_factory.mktemp("home"), steps=2, dense_steps=2).parent


def dense(home: Path, out: Path, progress: Progress = silent) -> None:
    train, dev = str(home / "train.tsv"), str(home / "dev.tsv")
    finetune(
        home / "encoder", task="classification", train=train, dev=dev, out=out, settings=SETTINGS, progress=progress
    )


def compressed(home: Path, out: Path, progress: Progress = silent) -> None:
    compress(
        home / "dense",
        task="classification",
        train=str(home / "train.tsv"),
        dev=str(home / "dev.tsv"),
        plan=CompressionPlan.load(home / "checkpoint" / "nxm_plan.json"),
        out=out,
        settings=SETTINGS,
        progress=progress,
    )


def killed_at(phase: str, step: int) -> Progress:
    def progress(what: str, done: int, total: int) -> None:
        if (what, done) == (phase, step):
            raise KeyboardInterrupt

    return progress


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer.schedule

    def reversed_order(*arguments: object, **more: object) -> list[int]:
        return plain(*arguments, **more)[::-1]  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "schedule", reversed_order)


def other_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine, with ``--precision auto``."""
    plain = trainer.wants_bf16("auto")
    monkeypatch.setattr(trainer, "wants_bf16", lambda _: not plain)


def other_distortions(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded_anew(*arguments: object) -> object:
        return augmented(*arguments[:-1], random.randrange(9, 99))  # type: ignore[arg-type, call-arg]

    monkeypatch.setattr("compressors.training.trainer.augmented", seeded_anew)


@pytest.mark.parametrize(("change", "named"), [(other_order, "order of samples"), (other_arithmetic, "precision")])
def test_a_training_checkpoint_of_another_training_is_refused_and_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, named: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        dense(home, tmp_path / "out", killed_at("dense", 3))
    work = tmp_path / ".out.work"
    (kept,) = [path.name for path in (work / "dense").glob("checkpoint-*")]
    with monkeypatch.context() as patched:
        assert callable(change)
        change(patched)
        with pytest.raises(ArtifactError) as refused:
            dense(home, tmp_path / "out")
    said = str(refused.value)
    assert re.search(rf"unfinished work that was begun with {named} \S+ \(now .*or remove", said)
    assert "another option, --precision too, removes it" in said, "who reads bf16 there asks for it"
    assert (work / "dense" / kept).is_dir()
    steps: list[int] = []
    dense(home, tmp_path / "out", lambda what, done, _: steps.append(done) if what == "dense" else None)
    assert steps[0] > 0, "with what it was begun with it goes on"


@pytest.mark.parametrize("change", [other_order, other_distortions])
def test_a_finished_phase_of_another_order_is_not_gone_on_from(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compressed(home, tmp_path / "out", killed_at("qat", 0))
    assert (tmp_path / ".out.work" / "admm.safetensors").is_file()
    assert callable(change)
    change(monkeypatch)
    with pytest.raises(ArtifactError, match="was begun with order of samples"):
        compressed(home, tmp_path / "out")


def test_a_damaged_result_of_a_phase_is_an_error_with_the_way_out(home: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compressed(home, tmp_path / "out", killed_at("qat", 0))
    file = tmp_path / ".out.work" / "admm.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ArtifactError, match=r"admm.safetensors: cannot be read .* remove it, and the phase admm is tra"
    ):
        compressed(home, tmp_path / "out")
    file.unlink()
    compressed(home, tmp_path / "out")
    assert not file.parent.exists()


def test_work_of_before_this_was_written_down_is_refused_and_removing_it_helps(home: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        dense(home, tmp_path / "out", killed_at("dense", 3))
    work = tmp_path / ".out.work"
    for file in (work / "dense.json", work / MADE_BY_FILE):
        file.unlink()
        with pytest.raises(
            ArtifactError, match="an earlier state of nxm-export began, which may have drawn samples in"
        ):
            dense(home, tmp_path / "out")
    for file in sorted(work.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    dense(home, tmp_path / "out")
    assert not work.exists()


def test_work_of_other_versions_is_refused_and_that_of_another_request_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    assert not take_ownership(work, "one")
    (work / "hours").touch()
    assert take_ownership(work, "one")
    installed = "compressors.training.resume.version"
    monkeypatch.setattr(installed, lambda package: "0.1" if package == "torch" else version(package))
    said = f"was begun with torch {version('torch')} (now 0.1); "
    with pytest.raises(ArtifactError, match=f"{re.escape(said)}.* or remove {work}"):
        take_ownership(work, "one")
    assert (work / "hours").is_file()
    assert not take_ownership(work, "another")
    assert not (work / "hours").exists()
    assert take_ownership(work, "another")


class EveryOther:
    """A schedule of dual updates."""

    def penalize(self, admm: Admm, step: int) -> None: ...

    def updates_at(self, step: int) -> bool:
        return step % 2 == 0


def test_a_resumed_phase_watches_at_the_dual_updates_of_an_uninterrupted_one(tmp_path: Path) -> None:
    layer = QuantLinear(nn.Linear(8, 8), WeightSpec.parse("2:4"), "w")
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()

    def watched(begin: int) -> set[int]:
        log = JsonLog(tmp_path / f"{begin}.jsonl", "admm")
        callback = AdmmCallback(Admm.of({"w": layer}, "mask", 0.5, warm_dual=False), EveryOther(), log, lambda: 0.25)
        callback.on_train_begin(arguments, TrainerState(global_step=begin), control)
        for step in range(begin + 1, 41):
            callback.on_step_end(arguments, TrainerState(global_step=step), control)
        lines = read_train_log(log.file)
        return {line.step for line in lines if line.projected_loss is not None}

    whole = watched(0)
    assert len(whole) > 3
    for begin in (1, 2, 13, 20):
        assert watched(begin) == {step for step in whole if step > begin}
