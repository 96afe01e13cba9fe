"""What an engine directory must show before it answers anybody: the expected hash, and a parity that is good enough.

`nxm serve`, `nxm predict` and `nxm triton` ask the same. Whoever sets ``--expect-sha256`` or ``--parity passed`` asks
for proof of all that is served, labels and tokenizer included, which a passport that covers the engine alone cannot
give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from engines.devices import running_on, runtime_here
from engines.parity.bisect_reports import BISECT_FILE, BisectReport, read_bisect_report
from engines.parity.reports import PARITY_FILE, ParityReport, read_parity_report
from engines.passport import EnginePassport, load_passport
from nxm_export.contract.choices import GATE, GATES
from nxm_export.errors import ArtifactError, ParityError, ServeError, notice
from nxm_export.storage.unreadable import is_without_room

# The files beside an engine that may say that it failed.
_REPORTS: Mapping[str, Callable[[Path], ParityReport | BisectReport]] = {
    PARITY_FILE: read_parity_report,
    BISECT_FILE: read_bisect_report,
}


def admitted(directory: Path, gate: str = GATE, expect_sha256: Collection[str] = ()) -> EnginePassport:
    """The passport of an engine directory that may answer.

    Its files are not looked at here: `covered_spec`, `covered_tokenizer` and `read_engine` hash what they
    read.
    Raises `ArtifactError` without a passport, `ServeError` for a hash that was not expected and for an unknown gate,
    `ParityError` for a parity that is not good enough for `gate` (one of `GATES`).
    """
    if gate not in GATES:
        raise ServeError(f"unknown gate {gate!r}; choose one of {', '.join(GATES)}")
    passport = load_passport(directory)
    require_expected(directory, passport, expect_sha256)
    require_gate(directory, passport, gate)
    _notice_other_machine(directory, passport)
    return passport


def _notice_other_machine(directory: Path, passport: EnginePassport) -> None:
    """Say so where an engine was compared on another kind of machine, or by another version of its runtime: the kernels
    for INT8 differ, and may round or saturate otherwise."""
    if gate_state(directory, passport) != "passed":
        return
    report = read_parity_report(directory / PARITY_FILE)
    for compared, here in ((report.machine, running_on(passport)), (report.runtime, runtime_here(passport))):
        if compared is not None and here is not None and compared != here:
            notice(
                f"{directory}: it was compared with its checkpoint on {compared}, and runs on {here}, where other "
                "kernels may run; run `nxm compare` here, too"
            )


def require_expected(directory: Path, passport: EnginePassport, expected: Collection[str]) -> None:
    """Raise `ServeError` unless `expected` is empty or has the hash of the engine file or of all contents."""
    if not expected:
        return
    if passport.engine_sha256 not in expected and passport.contents_sha256 not in expected:
        raise ServeError(
            f"{directory}: the engine's sha256 is {passport.engine_sha256}, that of all contents "
            f"{passport.contents_sha256 or 'unknown'}; neither is among those expected; "
            "serve the right directory, or expect this one with --expect-sha256"
        )
    if passport.companions is None:
        raise ServeError(
            f"{directory}: its passport covers the engine alone, so nothing says that its labels and tokenizer are the "
            "expected ones; build the engine again, or leave --expect-sha256 out"
        )


def require_unchanged(directory: Path, passport: EnginePassport) -> None:
    """Raise `ServeError` unless `passport` is still that of the directory: call it when engines are loaded, each of
    which has read the directory anew, and perhaps after it was replaced by another."""
    if load_passport(directory) != passport:
        raise ServeError(f"{directory} was replaced while it was loaded; load it again")


def gate_state(directory: Path, passport: EnginePassport) -> str:
    """``passed``, ``failed`` or ``unchecked``: what the parity report beside an engine, and a bisection, say about
    these very files.

    Raises `ArtifactError` where there is no room to open a report: it may say anything.
    """
    if failed_report(directory, passport) is not None:
        return "failed"
    if not (directory / PARITY_FILE).exists():
        return "unchecked"
    report = read_parity_report(directory / PARITY_FILE)
    compared = (report.engine_sha256, report.contents_sha256)
    return "passed" if compared == (passport.engine_sha256, passport.contents_sha256) else "unchecked"


def failed_report(directory: Path, passport: EnginePassport) -> Path | None:
    """The parity report, or else the bisection, beside an engine that says that this very engine failed; None where
    none does.

    One that cannot be read vouches for nothing, and counts as such. Raises `ArtifactError` where there is no room to
    open it.
    """
    for name, read in _REPORTS.items():
        file = directory / name
        if not file.exists():
            continue
        try:
            report = read(file)
        except ArtifactError as error:
            if is_without_room(error):
                raise
            return file
        if report.engine_sha256 == passport.engine_sha256 and not report.passed:
            return file
    return None


def require_gate(directory: Path, passport: EnginePassport, gate: str) -> None:
    """Raise `ParityError` unless the engine's parity is good enough for `gate` (one of `GATES`), and `ArtifactError`
    where there is no room to look."""
    state = gate_state(directory, passport)
    if gate == "off" or (state == "unchecked" and gate == "not-failed"):
        return
    if state == "passed":
        if gate == "passed" and passport.companions is None:
            raise ParityError(
                f"{directory}: its passport covers the engine alone, so nothing says that its labels and tokenizer are "
                "those that were compared; build the engine again and run `nxm compare`, or take --parity not-failed"
            )
        return
    failed, what = failed_report(directory, passport), "was never checked for these files"
    if failed is not None:
        try:
            _REPORTS[failed.name](failed)
        except ArtifactError as error:
            raise ParityError(f"{error}, or let the engine answer anyway with --parity off") from error
        what = "failed"
    name = PARITY_FILE if failed is None else failed.name
    command = "nxm compare --bisect" if name == BISECT_FILE else "nxm compare"
    raise ParityError(
        f"{directory}: parity with its checkpoint {what} ({name}); run `{command}`, or "
        "let it answer anyway with --parity off"
    )
