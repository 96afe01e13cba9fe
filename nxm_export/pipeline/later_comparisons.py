"""A run's summary, held against what was found of its engines since: `nxm compare` may have failed one that the run
passed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nxm_export.contract.records.run_summary import RunSummary, read_summary


def summary_now(root: str | Path) -> RunSummary:
    """The summary of a finished run, in which an engine that failed a later comparison has not passed; its ``parity``
    artifact is then the file that says so. Its numbers stay those of the run.

    Raises `ArtifactError` for a directory that is no run or not finished, and where there is no room to look.
    """
    summary = read_summary(root)
    parity, artifacts = dict(summary.parity), dict(summary.artifacts)
    for name, report in summary.parity.items():
        engine = artifacts.get(f"engine {name}")
        file = failed_file(Path(engine)) if engine and report.passed else None
        if file is not None:
            parity[name], artifacts[f"parity {name}"] = replace(report, passed=False), str(file)
    return replace(summary, parity=parity, artifacts=artifacts)


def failed_file(engine: Path) -> Path | None:
    """The file beside an engine that says it failed (see `engines.admission.failed_report`); None where none does, and
    where the engine is gone."""
    from engines.admission import failed_report
    from engines.passport import PASSPORT_FILE, load_passport

    return failed_report(engine, load_passport(engine)) if (engine / PASSPORT_FILE).is_file() else None
