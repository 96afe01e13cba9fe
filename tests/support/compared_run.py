"""A finished run of one engine whose answers are known, made of records: nothing is trained."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from engines.parity.reports import PARITY_FILE
from nxm_export.contract.records.run_summary import DIRECTORY, SUMMARY_FILE, ChosenEngine, EngineParity
from nxm_export.storage.run_dir import RunDir
from tests.support import exact_engine
from tests.support.records import SUMMARY

NAME = "ort-cpu-int8"
ENGINE = f"engines/{NAME}"


def compared_run(root: Path) -> Path:
    """A run whose engine passed: its stages are built, compared and summed up, as `nxm run` leaves them."""
    run, made = RunDir(root), exact_engine.build(root.with_name("made"))

    def compare(out: Path) -> None:
        exact_engine.write_parity(root / ENGINE, passed=True)
        shutil.copyfile(root / ENGINE / PARITY_FILE, out / PARITY_FILE)

    run.stage(f"build {NAME}", ENGINE, lambda out: shutil.copytree(made, out, dirs_exist_ok=True))
    run.stage(f"compare {NAME}", f"compare/{NAME}", compare, inputs={"passport": root / ENGINE / "passport.json"})
    summary = replace(
        SUMMARY,
        parity={NAME: EngineParity(1.0, 0.0, passed=True, value=1.0)},
        chosen=ChosenEngine(NAME, "ort", "no other backend was asked for"),
        artifacts={
            f"engine {NAME}": ENGINE,
            f"parity {NAME}": f"compare/{NAME}/{PARITY_FILE}",
            "checkpoint": "checkpoint",
        },
    )
    run.stage("summary", DIRECTORY, lambda out: (out / SUMMARY_FILE).write_text(summary.to_json()))
    return root
