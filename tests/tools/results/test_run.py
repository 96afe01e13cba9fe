"""The measuring tool runs only what is missing, and keeps predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from compressors.search.settings import SearchSettings
from nxm_export.data.metrics import mcc
from nxm_export.data.more_text import MoreText
from nxm_export.errors import DataError, PlanError
from tests.support import tiny
from tests.support.results_book import facts_of
from tools.results import tasks
from tools.results.__main__ import main
from tools.results.clock import Clock
from tools.results.page import render
from tools.results.records import (
    Record,
    decode_classes,
    one_hot,
)
from tools.results.rows import row_named
from tools.results.store import TaskStore

FAST = [
    "--max-length",
    "48",
    "--dense-steps",
    "30",
    "--steps",
    "4",
    "--batch-size",
    "16",
    "--learning-rate",
    "1e-3",
    "--precision",
    "fp32",
    "--dense-learning-rates",
    "3e-3",
    "--search-samples",
    "32",
    "--search-held-out",
    "32",
    "--threads",
    "1",
]

ROWS = "dense,dense-longer,one-shot-2:4+W4,magnitude-2:4+W4,nxm-2:4+W4,searched-packed-87.5"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny pretrained encoder and GLUE files, measured once."""
    out = tmp_path_factory.mktemp("results")
    tiny.write_model("bert", out / "encoder")
    tiny.write_data(out / "glue")
    assert measure(out, ROWS) == 0
    return out


def measure(place: Path, rows: str, *more: str, seeds: str = "0") -> int:
    paths = ["--data", str(place / "glue"), "--model", str(place / "encoder")]
    where = ["--work", str(place / "work"), "--results", str(place / "results")]
    return main(["run", "--task", "cola", "--rows", rows, "--seeds", seeds, *paths, *where, *FAST, *more])


def cola(place: Path) -> TaskStore:
    return TaskStore(place / "results", tasks.task_named("cola"))


def records(place: Path) -> dict[str, Record]:
    return {record.row: record for record in cola(place).records() if record.seed == 0}


def test_every_row_is_measured_from_one_dense_model(place: Path) -> None:
    measured = records(place)
    assert set(measured) == {row_named(name).name for name in ROWS.split(",")}
    teacher = measured["dense"].weights_sha256
    assert {record.teacher_sha256 for row, record in measured.items() if row != "dense"} == {teacher}
    steps = {row: measured[row].steps for row in ("nxm-2:4+W4", "one-shot-2:4+W4", "dense-longer")}
    assert steps == {"nxm-2:4+W4": 4, "one-shot-2:4+W4": 0, "dense-longer": 4}
    ours = facts_of(measured["nxm-2:4+W4"])
    assert ours.bytes.packed < ours.bytes.engine_sparse < ours.bytes.engine_dense < ours.bytes.fp32
    assert ours.compression.values == 1 - 4 / 2 / 32
    assert measured["nxm-2:4+W4"].dev_reads == 1
    assert ours.kl_to_dense is not None
    assert 0 < ours.kl_to_dense < 5
    assert ours.kl_by_sentence is not None
    assert len(ours.kl_by_sentence) == len(measured["nxm-2:4+W4"].predictions)
    assert np.mean(ours.kl_by_sentence) == pytest.approx(ours.kl_to_dense, rel=1e-4)  # five digits of each are kept
    assert set(ours.plan.weights.values()) == {"2:4+W4"}
    assert facts_of(measured["searched-packed-87.5"]).compression.packed >= 0.875
    assert cola(place).sensitivity_file(0).is_file()


def test_a_record_holds_what_its_predictions_say_and_no_path(place: Path) -> None:
    labels = decode_classes(cola(place).labels())
    lines = (place / "glue" / "dev.tsv").read_text().splitlines()[1:]
    assert labels.tolist() == [int(line.split("\t")[1]) for line in lines]
    for row, record in records(place).items():
        assert record.metrics["mcc"].value == mcc(one_hot(record.predictions, 2), labels), row
    assert str(place) not in cola(place).file.read_text()
    checkpoint = json.loads((place / "work" / "cola" / "s0" / "nxm-2of4+W4" / "metrics.json").read_text())
    predictions = decode_classes(records(place)["nxm-2:4+W4"].predictions)
    assert checkpoint["value"] == float((predictions == labels).mean())


def test_nothing_is_measured_twice_and_a_deleted_record_is_measured_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = cola(place).file
    written, before = file.stat().st_mtime_ns, file.read_text().splitlines()
    assert measure(place, ROWS) == 0
    assert "0 measured, 6 were there" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == written
    (gone,) = [number for number, line in enumerate(before) if '"row": "magnitude-2:4+W4"' in line]
    file.write_text("".join(f"{line}\n" for line in [*before[:gone], *before[gone + 1 :]]))
    assert measure(place, ROWS) == 0
    after = file.read_text().splitlines()
    assert [number for number in range(len(before)) if after[number] != before[number]] in ([], [gone])
    old, new = (json.loads(lines[gone]) for lines in (before, after))
    assert new["predictions"] == old["predictions"]
    assert new["compressed"]["mask_sha256"] == old["compressed"]["mask_sha256"]


def test_other_settings_are_told_and_do_not_replace_a_record_or_the_dense_model(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(place, "nxm-2:4+W4", "--learning-rate", "2e-3") == 0
    assert "measured with another learning_rate" in capsys.readouterr().err
    assert measure(place, "nxm-2:4+W8", "--dense-steps", "31") == 1
    assert "was trained with other settings" in capsys.readouterr().err
    (place / "other").mkdir()
    for split in ("train", "dev"):
        (place / "other" / f"{split}.tsv").write_text((place / "glue" / f"{split}.tsv").read_text())
    dev = (place / "other" / "dev.tsv").read_text()
    (place / "other" / "dev.tsv").write_text(dev.replace("\t1\n", "\t0\n", 1))
    assert measure(place, "dense", "--data", str(place / "other"), "--work", str(place / "work2"), seeds="7") == 1
    assert "the dev set is another one" in capsys.readouterr().err


def test_the_dense_grid_is_decided_on_held_out_training_sentences(place: Path, tmp_path: Path) -> None:
    options = ["--dense-learning-rates", "1e-6,3e-3", "--held-out", "40", "--results", str(tmp_path / "results")]
    assert measure(place, "dense", *options, "--work", str(tmp_path / "work")) == 0
    store = cola(tmp_path)
    grid = store.grid()
    assert grid is not None
    scores = {rate: score for (rate, _), score in grid.scores.items()}
    assert scores[3e-3] > scores[1e-6]
    assert records(tmp_path)["dense"].settings["dense_learning_rate"] == 3e-3
    (data,), (cut,) = (
        list((tmp_path / "work" / "cola" / folder).iterdir()) for folder in ("data", Path("grid", "data"))
    )
    train, held_out = set((data / "train.tsv").read_text().splitlines()), (cut / "dev.tsv").read_text().splitlines()
    assert len(held_out) == 41
    assert set(held_out) <= train
    page = tmp_path / "docs" / "results.md"
    assert "the best one is what every dense row uses" in render(tmp_path / "results", page).text
    store.write_grid(replace(grid, tried=tuple(replace(entry, score=-entry.score) for entry in grid.tried)))
    assert (
        "dense rows use 0.003 and 3 epochs, which this grid did not choose" in render(tmp_path / "results", page).text
    )


def test_render_makes_a_document_from_real_records(place: Path) -> None:
    rendered = render(place / "results", place / "docs" / "results.md")
    for name in ROWS.split(","):
        assert f"`{name}`" in rendered.text
    assert "### Searched plans" in rendered.text
    assert str(place) not in rendered.text
    assert render(place / "results", place / "docs" / "results.md").text == rendered.text


def test_texts_of_other_sets_reach_training_and_are_recorded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, texts = tiny.write_data(tmp_path, seed=9)[0], tmp_path / "texts.txt"
    common = ("--task", "cola", "--data", str(place / "glue"))
    assert main(["texts", *common, "--from", str(other), "--out", str(texts), "--work", str(tmp_path / "work")]) == 0
    given: list[MoreText | None] = []

    def stop(*_: object, more_text: MoreText | None, **__: object) -> None:
        given.append(more_text)
        raise DataError("enough")

    monkeypatch.setattr("tools.results.run.compress", stop)
    assert measure(place, "admm-2:4+W4-more-text", "--more-text", str(texts)) == 1
    assert measure(place, "admm-2:4+W4") == 1
    assert given == [MoreText((str(texts),), 0.5), None]
    assert measure(place, "admm-2:4+W4-more-text") == 1
    assert len(given) == 2


def test_a_change_of_the_search_reaches_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stop(*_: object, settings: SearchSettings, **__: object) -> None:
        asked.append((settings.method, settings.samples, settings.held_out))
        raise DataError("enough")

    monkeypatch.setattr("tools.results.run.search", stop)
    assert measure(place, "searched-hw-75-thorough") == 1
    assert measure(place, "searched-hw-75") == 1
    assert asked == [("nxm", 256, 256), ("nxm", 32, 32)]


def test_a_search_is_taken_up_only_where_it_asked_the_same_of_the_same_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = list[str]()

    def stop(name: str) -> Callable[..., None]:
        def stopped(*_: object, **__: object) -> None:
            called.append(name)
            raise DataError("enough")

        return stopped

    for name in ("search", "compress"):
        monkeypatch.setattr(f"tools.results.run.{name}", stop(name))
    for more in ([], ["--search-samples", "40"], ["--steps", "5"]):
        assert measure(place, "searched-packed-87.5", "--results", str(tmp_path / "results"), *more) == 1
    assert called == ["compress", "search", "search"]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed (extra: report)")
def test_pictures_are_drawn_and_the_same_each_time(place: Path) -> None:
    images = render(place / "results", place / "docs" / "results.md").images
    names = [f"cola-{what}-{theme}.svg" for what in ("compression", "sensitivity") for theme in ("light", "dark")]
    assert [image.name for image in images] == names
    first = [image.read_bytes() for image in images]
    render(place / "results", place / "docs" / "results.md")
    assert [image.read_bytes() for image in images] == first


def test_seconds_are_counted_on_for_the_same_work_alone(tmp_path: Path) -> None:
    file = tmp_path / "seconds"
    Clock(file, "one").keep()
    file.write_text(f"70.0 {file.read_text().split()[1]}\n")
    assert [int(Clock(file, work).seconds) for work in ("one", "other")] == [70, 0]
    file.write_text("70.0\n")  # before it was said of what
    assert int(Clock(file, "one").seconds) == 70


@pytest.mark.parametrize(
    ("task", "lines", "sentence", "pair", "labels"),
    [
        ("cola", ['gj04\t1\t\tThe "car" honked.', "gj04\t0\t*\tHim left."], 'The "car" honked.', "", ["1", "0"]),
        ("cola", ["sentence1\tsentence2\tlabel", "He left.\t\t1", "Him left.\t\t0"], "He left.", "", ["1", "0"]),
        (
            "rte",
            ["index\tsentence1\tsentence2\tlabel", "0\tA b.\tC.\tentailment", "1\tD.\tE.\tnot_entailment"],
            "A b.",
            "C.",
            ["entailment", "not_entailment"],
        ),
        (
            "mrpc",
            ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tA b.\t"C.', "0\t7\t9\tD.\tE."],
            "A b.",
            '"C.',
            ["1", "0"],
        ),
    ],
    ids=["CoLA as shipped", "CoLA with a header", "RTE", "MRPC"],
)
def test_glue_files_are_read_as_shipped(
    tmp_path: Path, task: str, lines: list[str], sentence: str, pair: str, labels: list[str]
) -> None:
    (tmp_path / "glue").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "glue" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = tasks.prepare(tasks.task_named(task), tmp_path / "glue", tmp_path / "out")
    rows = [line.split("\t") for line in files.dev.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["sentence1", "sentence2", "label"]
    assert rows[1][:2] == [sentence, pair]
    assert [row[2] for row in rows[1:]] == labels


def test_bad_requests_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PlanError, match="unknown row 'best'"):
        row_named("best")
    with pytest.raises(PlanError, match="row 'nxm-5:4'"):
        row_named("nxm-5:4")
    with pytest.raises(DataError, match="--data"):
        tasks.prepare(tasks.task_named("cola"), None, tmp_path / "out")
    with pytest.raises(DataError, match="no such file"):
        tasks.prepare(tasks.task_named("cola"), tmp_path, tmp_path / "out")
    assert main(["run", "--task", "cola", "--rows", "dense", "--seeds", "x", "--data", str(tmp_path)]) == 1
    assert "--seeds 'x'" in capsys.readouterr().err
    for seeds in ("0.5", "nan", "inf"):
        assert main(["run", "--task", "cola", "--rows", "dense", "--seeds", seeds, "--data", str(tmp_path)]) == 1
        assert f"--seeds are whole numbers, got {seeds}" in capsys.readouterr().err
    assert main(["run", "--task", "chess", "--rows", "dense"]) == 2
