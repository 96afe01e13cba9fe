"""What a comparison of engines with their checkpoint leaves behind: ``parity.json``, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.parity.decisions import Pair
from engines.parity.gates import GateResult
from engines.parity.probes import ProbeResult
from engines.parity.tolerance import OutputParity
from nxm_export.errors import EngineError, ParityError
from nxm_export.storage.json_files import as_objects, encode, entry_at, read_record, to_json_object

SCHEMA = "nxm-parity/2"
PARITY_FILE = "parity.json"
# What the engine gave for every sample, labels and groups: paired statistics need them all.
OUTPUTS_FILE = "outputs.npz"
_WAY_OUT = "run `nxm compare` again"


@dataclass(frozen=True)
class ParityReport:
    """An engine against its checkpoint, on `samples` samples; `metric` values are of both, with 95 % intervals.

    `difference` is engine - checkpoint in the metric's own unit; its interval resamples both together, so that it
    speaks of the difference and not of the samples. `secondary_metrics` are further metrics of the task: (checkpoint,
    engine). What NaN or infinity in the engine's outputs leaves without a value is None, and so is the interval of
    fewer than six samples. `passed` is what outputs, probes and gates say together (see `verdict`); a report that
    contradicts them is refused. `contents_sha256` is that of the engine's passport: of the engine with its labels and
    tokenizer. `machine` is what it ran on, and `runtime` the package that ran it with its version; None in reports of
    older versions. `failure` is why an engine failed when it ran: then there are no outputs, and no value of the
    checkpoint.
    """

    passed: bool
    engine: str
    engine_sha256: str
    backend: str
    samples: int
    outputs: tuple[OutputParity, ...]
    metric: str
    reference_value: float | None
    reference_interval: tuple[float, float] | None
    engine_value: float | None
    engine_interval: tuple[float, float] | None
    reason: str
    difference: float | None
    difference_interval: tuple[float, float] | None
    probes: tuple[ProbeResult, ...]
    gates: tuple[GateResult, ...]
    pairs: tuple[Pair, ...]
    secondary_metrics: Mapping[str, tuple[float | None, float | None]]
    contents_sha256: str | None = None
    machine: str | None = None
    runtime: str | None = None
    failure: str | None = None

    def __post_init__(self) -> None:
        if self.passed != (self.failure is None and verdict(self.outputs, self.probes, self.gates)):
            raise ValueError("`passed` is not what its outputs, probes and gates say")

    def require(self) -> None:
        """Raise `ParityError` unless `passed`."""
        if self.failure is not None:
            raise ParityError(f"{self.engine} failed when it ran, so it was not compared: {self.failure}")
        if not self.outputs:
            raise ParityError(f"{self.engine}: no output of it was compared; build it again from a new export")
        for output in self.outputs:
            if not output.passed:
                raise ParityError(
                    f"{self.engine}: {output.output} differs from the checkpoint: {output.complaint}. "
                    "`nxm compare --bisect` names the block; verify the graph, and build the "
                    "engine again from a new export"
                )
        for probe in self.probes:
            if probe.passed is False:
                raise ParityError(f"{self.engine}: the probe {probe.name!r} failed: {probe.reason}{probe.numbers}")
        for gate in self.gates:
            if not gate.passed:
                raise ParityError(f"{self.engine}: the gate {gate.gate} failed: {gate.reason}")

    def to_dict(self) -> dict[str, object]:
        """The form of ``parity.json`` and ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}


@dataclass(frozen=True)
class NotCompared:
    """An engine without a report, with the reason: this machine cannot run it, so that nothing is known about it; or it
    `failed` when it ran."""

    engine: str
    engine_sha256: str
    backend: str
    reason: str
    failed: bool = False

    def to_dict(self) -> dict[str, object]:
        """Its entry in ``--json``: `passed` is null and `skipped` the reason, or `passed` is false and `failed` it."""
        return {
            "schema": SCHEMA,
            "passed": False if self.failed else None,
            "engine": self.engine,
            "engine_sha256": self.engine_sha256,
            "backend": self.backend,
            "failed" if self.failed else "skipped": self.reason,
        }


@dataclass(frozen=True)
class Comparison:
    """All engines of one command: a report of each that runs here (what it iterates over), and why the others have
    none. `gates` are what was asked of all of them."""

    reports: tuple[ParityReport, ...]
    without_report: tuple[NotCompared, ...]
    gates: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ParityReport]:
        return iter(self.reports)

    def __len__(self) -> int:
        return len(self.reports)

    def __getitem__(self, number: int) -> ParityReport:
        return self.reports[number]

    def require(self) -> None:
        """Raise `ParityError` unless every report passed; a gate does not hold for an engine that was not run. Raise
        `EngineError` for an engine that failed when it ran."""
        if not self.reports:
            raise ParityError("no engine was compared, so none passed; compare one that runs here")
        for report in self.reports:
            report.require()
        for engine in self.without_report:
            if engine.failed:
                raise EngineError(f"{engine.engine} failed when it ran, so it was not compared: {engine.reason}")
        for engine in self.without_report if self.gates else ():
            raise ParityError(
                f"{engine.engine}: the gate {self.gates[0]} could not be checked, as it does not "
                f"run here: {engine.reason}"
            )

    @property
    def passed(self) -> bool:
        """False where `require` raises."""
        passed = bool(self.reports) and all(report.passed for report in self.reports)
        return passed and not any(self.gates or engine.failed for engine in self.without_report)

    def to_dict(self) -> dict[str, object]:
        """All of it in one record: whether `require` is content, the gates, and `to_list` as ``engines``."""
        return {"passed": self.passed, "gates": list(self.gates), "engines": self.to_list()}

    def to_list(self) -> list[dict[str, object]]:
        """The form of ``--json``: the reports, then the engines without one."""
        return [*(report.to_dict() for report in self.reports), *(engine.to_dict() for engine in self.without_report)]


def verdict(outputs: Sequence[OutputParity], probes: Sequence[ProbeResult], gates: Sequence[GateResult]) -> bool:
    """True when there are outputs, every one is within its tolerance, and no probe and no gate failed."""
    return (
        len(outputs) > 0
        and all(output.passed for output in outputs)
        and not any(probe.passed is False for probe in probes)
        and all(gate.passed for gate in gates)
    )


def report_text(report: ParityReport) -> str:
    """The text of ``parity.json``; raises `ParityError` that names engine and field for a number that JSON does not
    have."""
    try:
        return encode(report, SCHEMA)
    except ValueError as reason:
        raise ParityError(
            f"{report.engine}: the comparison gives no number to write ({reason}); what the checkpoint or the engine "
            "gives here is too large, or not a number: compress it again"
        ) from reason


def read_parity_report(file: Path) -> ParityReport:
    """The report in a ``parity.json`` of this version or the one before; raises `ArtifactError` by file and field."""
    return read_record(file, ParityReport, schema=SCHEMA, way_out=_WAY_OUT, older={"nxm-parity/1": _from_1})


def _from_1(fields: dict[str, object]) -> dict[str, object]:
    """A file of nxm-parity/1: other words, null for every NaN, and no count of such values for each output."""
    new = dict(fields)
    new["secondary_metrics"] = new.pop("beside")
    probes = [_actual(probe) for probe in as_objects(new["probes"])]
    new["probes"] = probes
    new["gates"] = [_actual(gate) for gate in as_objects(new["gates"])]
    nonfinite = _whole(probes[0]["actual"]) if probes else 0  # of all outputs together
    new["outputs"] = [_output_from_1(output, nonfinite) for output in as_objects(new["outputs"])]
    for key in ("reference_interval", "engine_interval", "difference_interval"):
        new[key] = _interval_from_1(new[key])
    new["pairs"] = [
        {**pair, "difference_interval": _interval_from_1(pair["difference_interval"])}
        for pair in as_objects(new["pairs"])
    ]
    return new


def _output_from_1(output: dict[str, object], nonfinite: int) -> dict[str, object]:
    names = {"quiet": "unchanged_share", "quiet_required": "unchanged_required", "step": "one_step_shift"}
    renamed = {names.get(key, key): value for key, value in output.items()}
    return {**renamed, "nonfinite": 0 if output["max_abs"] is not None else nonfinite}


def _actual(row: dict[str, object]) -> dict[str, object]:
    return {"actual" if key == "found" else key: value for key, value in row.items()}


def _whole(number: object) -> int:
    if not isinstance(number, (int, float)):
        raise TypeError(f"{number!r:.80} is no number")
    return int(number)


def _interval_from_1(bounds: object) -> object:
    return None if entry_at(bounds, 0) is None else bounds
