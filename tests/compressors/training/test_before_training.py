"""What cannot end well is refused before the first step, and a disk that fills up later is an error in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import CliRunner

from compressors.settings import Settings
from compressors.training.compress import finetune
from compressors.training.resume import take_ownership
from nxm_export.cli import main
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError, DataError
from nxm_export.graph.exporter import export
from nxm_export.hf.model_loading import load_task_model
from nxm_export.progress import Progress, silent
from tests.support import baked, onnx_text, tiny

SETTINGS = Settings(dense_steps=4, batch_size=8, precision="fp32")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a head, and its data."""
    directory = tmp_path_factory.mktemp("home")
    tiny.write_model("bert", directory / "model")
    tiny.write_data(directory)
    return directory


def train(home: Path, out: Path, *, model: str = "model", data: str = "train.tsv", progress: Progress = silent) -> None:
    finetune(
        home / model,
        task="classification",
        train=str(home / data),
        dev=str(home / "dev.tsv"),
        out=out,
        settings=SETTINGS,
        progress=progress,
    )


def test_tokens_that_the_table_has_no_row_for_are_named(home: Path, tmp_path: Path) -> None:
    model = shutil.copytree(home / "model", tmp_path / "model")
    tokenizer = tiny.tokenizer("bert")
    tokenizer.add_tokens(["zzz"])
    tokenizer.save(str(model / "tokenizer.json"))
    (tmp_path / "train.tsv").write_text((home / "train.tsv").read_text() + "a zzz film\t1\n")
    shutil.copyfile(home / "dev.tsv", tmp_path / "dev.tsv")
    with pytest.raises(ArtifactError, match=r"1 tokens in this data .* table of 36 embeddings has not: 'zzz' \(36\)"):
        train(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.copyfile(home / "train.tsv", tmp_path / "train.tsv")
    train(tmp_path, tmp_path / "out")  # one that the data does not have harms nobody


def test_kinds_of_tokens_that_the_model_does_not_know_are_refused_and_the_way_out_works(tmp_path: Path) -> None:
    model = tiny.write_model("bert", tmp_path / "model", options={"type_vocab_size": 1})
    tiny.write_data(tmp_path, pairs=True)
    with pytest.raises(ArtifactError, match=r"tells 2 kinds of tokens apart, and the model \(type_vocab_size\) 1; set"):
        train(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    file = model / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **names}))
    train(tmp_path, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "graph")
    feeds = baked.feeds("bert", 3, 7, padding=2)
    network = load_task_model(tmp_path / "out", TASKS["classification"])
    with torch.no_grad():
        expected = network(**{name: torch.from_numpy(array) for name, array in feeds.items()}).logits
    actual = onnx_text.run(tmp_path / "graph" / "model.onnx", feeds)["logits"]
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-4)


def test_dev_data_that_no_metric_can_score_is_refused(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_text("text\tlabel\na film\t0.5\nthe story\t0.5\n")
    with pytest.raises(DataError, match=r"every label is 0\.5, so there is no correlation to score"):
        finetune(
            home / "model", task="regression", train=str(file), dev=str(file), out=tmp_path / "out", settings=SETTINGS
        )


def test_a_disk_without_room_for_training_checkpoints_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(ArtifactError, match=r"the phase dense, with its training .* needs about .* 0\.1 MB free"):
        train(home, tmp_path / "out")


def test_a_disk_that_fills_up_at_a_training_checkpoint_is_an_error_that_names_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "checkpoint-1"))

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", full)
    with pytest.raises(ArtifactError, match=r"checkpoint-1: cannot be written \(No space left on device\)"):
        train(home, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compression_that_fails_before_its_head_is_trained_leaves_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tsv").write_text("text\tlabel\n" + "good film\t1\n" * 8)
    arguments = ["compress", home / "model", "--train", tmp_path / "bad.tsv", "--dev", home / "dev.tsv"]
    done = CliRunner().invoke(main, [*map(str, arguments), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    assert [file.name for file in tmp_path.iterdir()] == ["bad.tsv"]


def test_a_head_that_is_made_anew_is_said_before_training_and_in_json(home: Path, tmp_path: Path) -> None:
    arguments = ["compress", str(home / "model"), "--train", str(home / "train.tsv"), "--dev", str(home / "dev.tsv")]
    settings = ["--steps", "2", "--dense-steps", "2", "--batch-size", "8", "--recipe", "one-shot", "--json"]
    first = CliRunner().invoke(main, [*arguments, *settings, "--out", str(tmp_path / "out")])
    assert first.exit_code == 0, first.output
    assert "it has no classification head, and a new classification head is trained" in first.stderr
    assert json.loads(first.stdout)["head"] == "new"
    arguments[1] = str(tmp_path / "out-dense" / "dense")
    second = CliRunner().invoke(main, [*arguments, *settings, "--out", str(tmp_path / "again")])
    assert second.exit_code == 0, second.output
    assert "head" not in second.stderr
    assert json.loads(second.stdout)["head"] == "kept"


def test_a_kill_while_a_former_training_checkpoint_is_removed_costs_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, killed = shutil.rmtree, list[Path]()

    def killed_at_a_file(path: str | Path, ignore_errors: bool = False) -> None:
        if Path(path).name.startswith("checkpoint-") and not killed:
            killed.append(Path(path))
            (Path(path) / "optimizer.pt").unlink()
            raise KeyboardInterrupt
        plain(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", killed_at_a_file)
    with pytest.raises(KeyboardInterrupt):
        train(home, tmp_path / "out")
    assert [path.name for path in killed] == ["checkpoint-1"]
    steps: list[int] = []
    train(home, tmp_path / "out", progress=lambda what, done, _: steps.append(done) if what == "dense" else None)
    assert steps[0] == 2, "it goes on from the checkpoint that took the place of the former"


def test_work_that_was_half_removed_for_another_request_is_not_taken_for_that_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not take_ownership(tmp_path / "work", "first")
    (tmp_path / "work" / "dense").mkdir()
    removed = list[str]()

    def killed(path: str | Path, ignore_errors: bool = False) -> None:
        removed.append(Path(path).name)
        (Path(path) / "dense").rmdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            take_ownership(tmp_path / "work", "second")
    assert removed == ["work"]
    assert not take_ownership(tmp_path / "work", "first")
