"""``summary.json``: written and read again, refused by file and field, and judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nxm_export.contract.records.run_summary import (
    DIRECTORY,
    SUMMARY_FILE,
    EngineParity,
    Likeness,
    OneClass,
    RunSummary,
    read_summary,
    read_summary_file,
)
from nxm_export.errors import ArtifactError, EngineError, ParityError
from nxm_export.storage.json_files import as_object, entry_at
from nxm_export.storage.run_dir import RunDir
from tests.support.records import SUMMARY


def saved(directory: Path, text: str) -> Path:
    file = directory / SUMMARY_FILE
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "summary",
    [
        SUMMARY,
        replace(SUMMARY, dense=None, difference_interval=(None, None), trt_rtx=None),
        replace(SUMMARY, embedding="int8", cosine_to_dense=Likeness(0.99, 0.9)),
        replace(SUMMARY, one_class=OneClass("good", 0.5, (0.1, 0.4))),
    ],
    ids=["classification", "without numbers", "embeddings", "one class"],
)
def test_a_summary_comes_back_as_it_was_written(tmp_path: Path, summary: RunSummary) -> None:
    assert read_summary_file(saved(tmp_path, summary.to_json())) == summary


def test_a_file_without_what_only_some_runs_have_is_read(tmp_path: Path) -> None:
    fields = {
        key: value
        for key, value in SUMMARY.to_dict().items()
        if key not in ("embedding", "cosine_to_dense", "one_class")
    }
    assert read_summary_file(saved(tmp_path, json.dumps(fields))) == SUMMARY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mood": "good"}, "unknown field mood"),
        (
            {"parity": {"ort": {**as_object(entry_at(SUMMARY.to_dict(), "parity", "ort-cpu-int8")), "mood": 1}}},
            "unknown field parity.ort.mood",
        ),
        ({"dev_samples": "many"}, "dev_samples: Expected `int`, got `str`"),
        ({"difference_interval": [0.5]}, "difference_interval: Expected `array` of length 2, got 1"),
        ({"schema": "nxm-summary/9"}, "schema nxm-summary/9 is not the nxm-summary/1"),
        ({"dense": float("nan")}, "NaN is not a JSON number"),
    ],
    ids=str,
)
def test_what_a_summary_cannot_hold_is_refused_by_file_and_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    file = saved(tmp_path, json.dumps({**SUMMARY.to_dict(), **change}))
    with pytest.raises(ArtifactError) as refused:
        read_summary_file(file)
    assert str(refused.value).startswith(str(file))
    assert message in str(refused.value)


def test_a_number_that_is_none_is_never_written_as_one() -> None:
    with pytest.raises(ValueError, match=r"RunSummary\.compressed is nan"):
        replace(SUMMARY, compressed=float("nan")).to_json()


def test_artifacts_are_found_from_where_the_run_lies(tmp_path: Path) -> None:
    root = tmp_path / "run"
    RunDir(root)
    with pytest.raises(ArtifactError, match="has no summary yet; run the same `nxm run` again"):
        read_summary(root)
    (root / DIRECTORY).mkdir()
    saved(root / DIRECTORY, SUMMARY.to_json())
    moved = root.rename(tmp_path / "moved")
    assert read_summary(moved).artifacts["checkpoint"] == str(moved / "checkpoint")


def test_a_difference_or_an_engine_that_could_not_be_built_does_not_pass() -> None:
    SUMMARY.require_passed()
    differing = replace(SUMMARY, parity={"ort-cpu-int8": EngineParity(0.5, 1.0, False, 0.5)})
    with pytest.raises(ParityError, match=r"parity failed for ort-cpu-int8: see compare/ort-cpu-int8/parity\.json"):
        differing.require_passed()
    with pytest.raises(EngineError, match="trt_rtx failed: no parser"):
        replace(SUMMARY, failed={"trt_rtx": "no parser"}).require_passed()
