"""Rows of results on a machine that is there for minutes."""

from __future__ import annotations

import tarfile
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from tests.support import tiny
from tools.gpu import glue_rows, transfers
from tools.results import run, tasks
from tools.results.store import TaskStore


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
    page = packed.parent / "out" / "stand-in-rows.md"
    assert "nothing of this is about a GPU" in page.read_text(encoding="utf-8")
    assert "| cola | 0 | `dense` | mcc " in page.read_text(encoding="utf-8")
    assert archived(packed) == ["unfinished/cola-s0/cola.jsonl"]
    with monkeypatch.context() as kept:
        kept.setattr(run, "finetune", MagicMock(side_effect=AssertionError("the dense model is there")))
        assert rehearse(packed, "work") == 0
    assert archived(packed) == ["results/cola.jsonl"]
    dense, compressed = page.read_text(encoding="utf-8").splitlines()[-2:]
    assert "| - | 2 | " in dense, "the dense model is not compared with itself"
    assert compressed.startswith("| cola | 0 | `magnitude-2:4+W4` | mcc ")
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
