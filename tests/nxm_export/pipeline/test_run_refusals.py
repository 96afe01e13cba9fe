"""What `nxm run` refuses, in words, before it is trained or made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nxm_export.graph import external_data
from tests.support import tiny
from tests.support.run_desk import Desk, refused


def test_a_backend_that_cannot_run_here_is_refused_before_anything_is_made(desk: Desk, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        result = desk.nxm(*desk.arguments(tmp_path / "run", "--backend=openvino,cusparselt", *more))
        refused(result, r"backend cusparselt cannot run here: .*(pip install|no NVIDIA driver|no GPU)")
    refused(desk.nxm(*desk.arguments(tmp_path / "run", "--backend=tpu")), "'tpu' is not one of auto, ort", (2,))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--more-text-share=0.5"], 2, "is the share of --more-text"),
        (["--more-text=none.txt", "--steps=0"], 1, "nothing is trained"),
        (["--more-text=none.txt"], 1, "none.txt: no such file"),
    ],
)
def test_more_text_that_cannot_be_used_is_refused(
    desk: Desk, tmp_path: Path, more: list[str], code: int, message: str
) -> None:
    result = desk.nxm(*desk.arguments(tmp_path / "run", "--dry-run", *more))
    assert (result.exit_code, list(tmp_path.iterdir())) == (code, [])
    assert message in result.stderr


def _lines(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=str)
def test_a_search_wants_labels_also_where_nothing_trains(desk: Desk, tmp_path: Path, more: list[str]) -> None:
    model = tiny.write_model("bert", tmp_path / "model", head="classification", layers=1)
    texts = _lines(tmp_path / "texts.tsv", "sentence", *["good film", "bad film"] * 40)
    arguments = desk.arguments(tmp_path / "run", "--steps=0", *more, model=model, train=texts)
    refused(desk.nxm(*arguments, "--search=0.8"), "none of the usual label columns")
    assert not (tmp_path / "run").exists()
    if more:
        assert desk.nxm(*arguments).exit_code == 0, "without a search they are not needed"


BAD_DATA: dict[str, tuple[list[str], str]] = {
    "no rows": (["sentence\tlabel"], "no rows|empty|no samples"),
    "one class": (["sentence\tlabel", *["good film\t1"] * 40], "one class"),
    "another column": (["words\tlabel", "good film\t1", "bad film\t0"], "column"),
    "a row too short": (["sentence\tlabel", "good film\t1", "bad film"], r"bad\.tsv:3"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_training_data_is_named_and_nothing_is_left(desk: Desk, tmp_path: Path, name: str) -> None:
    lines, message = BAD_DATA[name]
    train = _lines(tmp_path / "bad.tsv", *lines)
    result = desk.nxm(*desk.arguments(tmp_path / "run", train=train))
    refused(result, message)
    assert not (tmp_path / "run").exists()


def test_a_dev_label_outside_the_classes_is_named(desk: Desk, tmp_path: Path) -> None:
    dev = _lines(tmp_path / "dev.tsv", "sentence\tlabel", "good film\t1", "bad film\tmaybe")
    refused(desk.nxm(*desk.arguments(tmp_path / "run", dev=dev)), "maybe")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pattern=3:7"], "divisible by 7"),
        (["--pattern=4:2"], "4:2"),
        (["--weight-bits=9"], "9"),
        (["--keep-dense=*", "--steps=2"], "nothing to compress"),
        (["--train=/nowhere/train.tsv"], "/nowhere/train.tsv"),
        (["--dense-learning-rate=1e30"], "loss is nan at step"),
        (["--weights-stored=int4"], "4 bits or fewer, and these have 8"),
        (["--weights-stored=int4", "--weight-bits=none"], "4 bits or fewer, and these have none"),
    ],
)
def test_what_cannot_work_is_refused_in_words(desk: Desk, tmp_path: Path, more: list[str], message: str) -> None:
    result = desk.nxm(*desk.arguments(tmp_path / "run"), *more)
    refused(result, message, codes=(1, 2))


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--search=0.99"], "compression 0.99 by counting hw is out of reach"),
        (["--more-text=pairs.tsv"], "only one of them has a second text"),
        ([], "an engine for the CPU is one ONNX file, which holds 0.0 GB; a run always has"),
    ],
)
def test_what_can_be_known_is_refused_before_anything_is_trained(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str, dry: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    _lines(tmp_path / "pairs.tsv", "sentence1\tsentence2", "good film\tbad film")
    if not more:
        monkeypatch.setattr(external_data, "PROTOBUF_LIMIT", 1000)
    refused(desk.nxm(*desk.arguments(tmp_path / "run", *more, *(["--dry-run"] if dry else []))), message)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_nowhere_is_named(desk: Desk, tmp_path: Path) -> None:
    refused(desk.nxm(*desk.arguments(tmp_path / "run", model=Path("nobody/nothing"))), "nobody/nothing")


def test_a_directory_that_is_no_run_is_left_alone(desk: Desk, tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    refused(desk.nxm(*desk.arguments(mine)), "thesis")
    assert [file.name for file in mine.iterdir()] == ["chapter.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_named(desk: Desk, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(desk.nxm(*desk.arguments(tmp_path / "run")), "run")
