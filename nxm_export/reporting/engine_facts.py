"""What a report knows of one engine: its passport, its size, and what was found when it was compared.

Reports of another engine are left out, and said to be so. Of those that are of this one, each is believed where it says
that the engine failed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nxm_export.errors import ArtifactError, NxmError
from nxm_export.reporting.figures import Figure, RunFile
from nxm_export.reporting.run_files import Files
from nxm_export.storage.hashing import file_hash

if TYPE_CHECKING:
    from engines.parity.bisect_reports import BisectReport, BlockParity
    from engines.parity.reports import ParityReport
    from engines.passport import EnginePassport
    from engines.sparsity.sparsity_report import SparsityReport, WeightSparsity

    Judged = TypeVar("Judged", ParityReport, BisectReport)

PASSPORT = "passport.json"


@dataclass(frozen=True)
class EngineEntry:
    """One engine directory, or a comparison whose engine is gone.

    `parity` is the comparison that the run made, and `failed_later` another one of this engine, which failed.
    `bisection` has errors per encoder block, where somebody looked for them: those that failed where there are several.
    `sparsity` says which matrix runs sparse, on which kernel, None where the backend has no sparse kernels.
    """

    name: str
    passport: RunFile[EnginePassport] | None
    bytes: Figure | None
    parity: RunFile[ParityReport] | None
    bisection: RunFile[BisectReport] | None
    sparsity: SparsityReport | None
    sparse_kernels: bool = False  # its backend has them
    failed_later: RunFile[ParityReport] | None = None

    @property
    def failed_by(self) -> str | None:
        """The file that says that the engine failed; None where none does."""
        reports = (self.parity, self.failed_later, self.bisection)
        return next((report.file for report in reports if report is not None and not report.content.passed), None)

    @property
    def comparisons(self) -> tuple[tuple[str, RunFile[ParityReport]], ...]:
        """What a page shows: the run's comparison under the engine's name, one that failed later under its file's."""
        later = self.failed_later
        return (
            *([] if self.parity is None else [(self.name, self.parity)]),
            *([] if later is None else [(later.file, later)]),
        )

    @property
    def parts_in(self) -> str | None:
        """The first block that a bisection found to part from the checkpoint."""
        return self.bisection.content.first_diverging if self.bisection else None

    @property
    def blocks(self) -> tuple[BlockParity, ...]:
        """The blocks of the bisection, if there is one."""
        return self.bisection.content.blocks if self.bisection else ()

    @property
    def matrices(self) -> tuple[WeightSparsity, ...]:
        """What is known of each matrix's kernel."""
        return tuple(self.sparsity.weights) if self.sparsity else ()


def read_engine(files: Files, name: str, directory: str, evidence: list[str]) -> EngineEntry:
    """One engine `directory` below the root of `files`; `evidence` are directories that may hold its comparison, that
    of the run first."""
    from engines.base import BACKENDS, backend
    from engines.parity.bisect_reports import BISECT_FILE, read_bisect_report
    from engines.parity.reports import PARITY_FILE, read_parity_report
    from engines.passport import load_passport

    passport = files.decoded(_join(directory, PASSPORT), lambda file: load_passport(file.parent))
    reports = [files.decoded(_join(place, PARITY_FILE), read_parity_report) for place in evidence]
    bisections = [files.decoded(_join(place, BISECT_FILE), read_bisect_report) for place in evidence]
    size, sparsity, sparse_kernels = None, None, False
    if passport is not None:
        size = _checked_engine(files, directory, passport.content)
        reports = [_of_these_contents(files, _of_this_engine(files, report, passport), passport) for report in reports]
        bisections = [_of_this_engine(files, bisection, passport) for bisection in bisections]
        runtime = passport.content.backend
        sparse_kernels = runtime in BACKENDS and backend(runtime).CAPABILITIES.sparse_kernels
        sparsity = _sparsity(files, directory, runtime) if sparse_kernels else None
    parity = next(filter(None, reports), None)
    bisection = _failed(bisections) or next(filter(None, bisections), None)
    later = _failed([report for report in reports if parity and report and report.content != parity.content])
    return EngineEntry(name, passport, size, parity, bisection, sparsity, sparse_kernels, later)


def _failed(reports: Sequence[RunFile[Judged] | None]) -> RunFile[Judged] | None:
    """The first that did not pass."""
    return next((report for report in reports if report is not None and not report.content.passed), None)


def _checked_engine(files: Files, directory: str, passport: EnginePassport) -> Figure | None:
    """Bytes of the engine file that a passport names, None where it is missing; another file is a doubt, and so are
    other labels or another tokenizer beside it."""
    file = _join(directory, passport.engine)
    size = files.size(file)
    if size is None:
        files.doubts.append(f"{file} is missing, and the passport beside it names it")
    elif file_hash(files.root / file) != passport.engine_sha256:
        files.doubts.append(f"{file} is not the engine of its passport (its sha256 differs); build it again")
    try:
        passport.require_companions(files.root / directory)
    except ArtifactError as error:
        files.doubt(error)
    return size


def _of_this_engine(
    files: Files, report: RunFile[Judged] | None, passport: RunFile[EnginePassport]
) -> RunFile[Judged] | None:
    """The report, unless it names another engine than the passport does."""
    if report is None or report.content.engine_sha256 == passport.content.engine_sha256:
        return report
    files.doubts.append(
        f"{report.file} compared another engine than the one of {passport.file} (their sha256 differ): it is not "
        "shown; compare again"
    )
    return None


def _of_these_contents(
    files: Files, report: RunFile[ParityReport] | None, passport: RunFile[EnginePassport]
) -> RunFile[ParityReport] | None:
    """The comparison, unless the engine was compared with other labels or another tokenizer than the passport has."""
    if report is None or report.content.contents_sha256 == passport.content.contents_sha256:
        return report
    files.doubts.append(
        f"{report.file} compared the engine of {passport.file} with other labels or another tokenizer (their "
        "contents_sha256 differ): it is not shown; compare again"
    )
    return None


def worst_output(report: RunFile[ParityReport], key: str, *, least: bool = False) -> Figure | None:
    """The largest (or smallest) value of a comparison's outputs, which is the one that a summary has; None is the
    worst."""
    figures = [report.figure("outputs", number, key) for number in range(len(report.content.outputs))]
    known = [figure for figure in figures if figure is not None]
    sign = -1.0 if least else 1.0
    return max(known, key=lambda figure: math.inf if figure.number is None else sign * figure.number, default=None)


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _sparsity(files: Files, directory: str, runtime: str) -> SparsityReport | None:
    from engines.base import ProfiledFacts, backend
    from engines.sparsity.engine_report import read_sparsity_report

    try:
        if backend(runtime).CAPABILITIES.profiled_kernels:
            facts = backend(runtime).inspect(files.root / directory)
            return facts.sparsity if isinstance(facts, ProfiledFacts) else None
        return read_sparsity_report(files.root / directory)
    except NxmError as error:
        files.doubts.append(f"{directory or '.'}: which kernels run cannot be read ({error})")
        return None
