"""Does an engine compute what its checkpoint computes? Compared on real samples, with a tolerance that has a reason.

A quantized network is a staircase: where two correct implementations round a sum differently, a code moves by one step,
and that step travels to the output. So tolerances are measured, on the network and the samples at hand, never guessed.
The reference is PyTorch in float64 (`engines.reference.pytorch`, ``exact``), and what is tolerated comes from two more runs of it:

* *noise*: the reference in the engine's float type. What it differs by is what rounding alone does here.
* *step*: one random code of every sample moves by one step in every quantized tensor: the least that a quantizer can err.

An engine passes when its largest error is within a small multiple of the largest of both, its mean error within a small
multiple of the noise's, and when, where codes rarely move (float32), it leaves about as many samples exactly alone as the
noise does. The last is the sharp one: an engine that is wrong anywhere, be it one scale of one channel, moves *every*
sample, while rounding leaves most of them alone. In half precision every sample moves by rounding alone; there, mistakes
smaller than a quantizer's own error (one missing pair) do not show in outputs, and only `nxm verify` and the comparison
block by block (`engines.parity.bisect`) find them.

That tolerance always holds. Beside it stand the probes (`engines.parity.probes`) and the gates that the user sets (`engines.parity.gates`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Engine, backend
from engines.parity.compatibility import plan_of, require_alike, require_from, require_outputs
from engines.parity.decisions import DECIDING, Pair, cosines, pair_of, spread
from engines.parity.gates import Gate, GateResult, check_gate, table_drop
from engines.parity.probes import Expected, Probe, finite_probe, probe, probe_samples
from engines.parity.tolerance import (
    JITTER,
    MAX_FACTOR,
    MEAN_FACTOR,
    QUANTIZER_JITTER,
    QUIET_FACTOR,
    OutputParity,
    compare_output,
    floor,
    largest,
    max_tolerance,
)
from engines.passport import EnginePassport, load_passport
from engines.reference import pytorch
from engines.reference.pytorch import Perturbation
from nxm_export.contract.io_spec import IOSpec, load_spec
from nxm_export.contract.tasks import TASKS
from nxm_export.data.examples import Features, filled, group_array, label_array, pad, sorted_batches
from nxm_export.data.metrics import interval, metric_named, paired_interval, require_scorable, scored_outputs
from nxm_export.data.question_answering import context_mask
from nxm_export.errors import ArtifactError, DataError, EngineUnavailable, ParityError
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import json_text

SCHEMA = "nxm-parity/1"
PARITY_FILE = "parity.json"
OUTPUTS_FILE = (
    "outputs.npz"  # what the engine gave for every sample, labels and groups: paired statistics need them all
)
NOISE_SAMPLES, STEP_SAMPLES = 256, 64
PROBE_COPIES = 4  # of a probe's sample: its tolerance is measured on as many draws


@dataclass(frozen=True)
class ParityReport:
    """An engine against its checkpoint, on `samples` samples; `metric` values are of both, with 95 % intervals.

    `difference` is engine - checkpoint in the metric's own unit; its interval resamples both together, so that it speaks of
    the difference and not of the samples. `beside` are further metrics of the task: (checkpoint, engine).
    """

    engine: str
    engine_sha256: str
    backend: str
    samples: int
    outputs: list[OutputParity]
    metric: str
    reference_value: float
    reference_interval: tuple[float, float]
    engine_value: float
    engine_interval: tuple[float, float]
    reason: str
    difference: float
    difference_interval: tuple[float, float]
    probes: list[Probe]
    gates: list[GateResult]
    pairs: list[Pair]
    beside: Mapping[str, tuple[float, ...]]

    @property
    def passed(self) -> bool:
        """True when every output is within its tolerance, and no probe and no gate failed."""
        return (
            all(output.passed for output in self.outputs)
            and not any(row.passed is False for row in self.probes)
            and all(gate.passed for gate in self.gates)
        )

    def require(self) -> None:
        """Raise `ParityError` unless `passed`."""
        for output in self.outputs:
            if not output.passed:
                raise ParityError(
                    f"{self.engine}: {output.output} differs from the checkpoint: max {output.max_abs:.4g} (tolerated {output.max_tolerance:.4g}), "
                    f"mean {output.mean_abs:.4g} (tolerated {output.mean_tolerance:.4g}), {output.quiet:.1%} of the samples equal "
                    f"(required {output.quiet_required:.1%}), {output.unexcused_flips} classes changed beyond the tolerance, "
                    f"worst at sample {output.worst_sample}. `nxm compare --bisect` names the block; verify the graph, and build "
                    "the engine again from a new export"
                )
        for row in self.probes:
            if row.passed is False:
                numbers = "" if row.found is None else f" (found {row.found:.4g}, tolerated {row.tolerated:.4g})"
                raise ParityError(f"{self.engine}: the probe {row.name!r} failed: {row.reason}{numbers}")
        for gate in self.gates:
            if not gate.passed:
                raise ParityError(f"{self.engine}: the gate {gate.gate} failed: {gate.reason}")

    def to_dict(self) -> dict[str, Any]:
        """The form of ``parity.json`` and ``--json``."""
        return {"schema": SCHEMA, "passed": self.passed, **asdict(self)}


@dataclass(frozen=True)
class Skipped:
    """An engine that this machine cannot run, with the reason; nothing is known about it."""

    engine: str
    engine_sha256: str
    backend: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Its entry in ``--json``: `passed` is null, and `skipped` the reason."""
        return {
            "schema": SCHEMA,
            "passed": None,
            "engine": self.engine,
            "engine_sha256": self.engine_sha256,
            "backend": self.backend,
            "skipped": self.reason,
        }


@dataclass(frozen=True)
class Comparison:
    """All engines of one command: a report of each that runs here (what it iterates over), and why the others do not.
    `gates` are what was asked of all of them."""

    reports: list[ParityReport]
    skipped: list[Skipped]
    gates: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ParityReport]:
        return iter(self.reports)

    def __len__(self) -> int:
        return len(self.reports)

    def __getitem__(self, number: int) -> ParityReport:
        return self.reports[number]

    def require(self) -> None:
        """Raise `ParityError` unless every report passed; a gate does not hold for an engine that was not run."""
        for report in self.reports:
            report.require()
        for engine in self.skipped if self.gates else ():
            raise ParityError(
                f"{engine.engine}: the gate {self.gates[0]} could not be checked, as it does not run here: {engine.reason}"
            )

    def to_list(self) -> list[dict[str, Any]]:
        """The form of ``--json``: the reports, then what was skipped."""
        return [*(report.to_dict() for report in self.reports), *(engine.to_dict() for engine in self.skipped)]


def compare(
    checkpoint: str | Path,
    engine: str | Path,
    features: Sequence[Features],
    *,
    gates: Sequence[Gate] = (),
    batch_size: int = 32,
) -> ParityReport:
    """`compare_all` of one engine."""
    return compare_all(checkpoint, [engine], features, gates=gates, batch_size=batch_size).reports[0]


def compare_all(
    checkpoint: str | Path,
    engines: Sequence[str | Path],
    features: Sequence[Features],
    *,
    gates: Sequence[Gate] = (),
    batch_size: int = 32,
) -> Comparison:
    """Run a checkpoint and engine directories made from it on the same samples; writes ``parity.json`` and
    ``outputs.npz`` beside every engine that runs here.

    `features` are token features with ``labels`` (see `nxm_export.data.examples.encode`). Raises `EngineUnavailable` when no
    engine can run here, `DataError` for data that does not fit, `ArtifactError` for engines of another checkpoint and
    for engines that cannot be compared with each other; then nothing is written.
    """
    checkpoint = Path(checkpoint)
    if not features:
        raise DataError("no samples to compare on")
    parts = [open_part(checkpoint, Path(engine)) for engine in engines]
    require_alike([(part.directory, part.spec) for part in parts])
    task = TASKS[parts[0].spec.task]
    if task.output_kind not in DECIDING and any(gate.quantity == "flips" for gate in gates):
        raise DataError(f"a gate on flips needs classes, and {task.name} has none; use drop or max_abs")
    if task.output_kind != "vector" and any(gate.quantity == "cosine" for gate in gates):
        raise DataError(
            f"a gate on the cosine needs embeddings, and these engines are for {task.name}; use drop or max_abs"
        )
    for gate in gates:
        if gate.quantity == "drop":
            if gate.metric not in (None, task.metric, *task.secondary_metrics):
                raise DataError(
                    f"{gate}: {task.name} has the metrics {', '.join((task.metric, *task.secondary_metrics))}"
                )
            require_scorable(gate.metric or task.metric, label_array(features), parts[0].spec.labels)
    beforehand = {"table": table_drop(checkpoint)} if any(gate.quantity == "table" for gate in gates) else {}
    parts, skipped = _runnable(parts)
    measured: dict[str, _Measured] = {}  # engines of one dtype and placement share the reference
    found: list[tuple[dict[str, np.ndarray], list[Probe]]] = []
    for part in parts:
        if part.key not in measured:
            measured[part.key] = _measure(checkpoint, part, features, batch_size)
        found.append(_run(part, measured[part.key], features, batch_size))
    reports = []
    for part, (outputs, probes) in zip(parts, found, strict=True):
        others = [
            (other, theirs)
            for other, (theirs, _) in zip(parts, found, strict=True)
            if other.directory != part.directory
        ]
        reports.append(_report(part, measured[part.key], outputs, probes, others, features, gates, beforehand))
    labels, groups = label_array(features), group_array(features)
    beside = {"labels": labels} if groups is None else {"labels": labels, "groups": groups}
    for part, (outputs, _), report in zip(parts, found, reports, strict=True):
        write_atomic(part.directory / PARITY_FILE, json_text(report.to_dict()))
        packed = io.BytesIO()
        np.savez(packed, **{**outputs, **beside})  # type: ignore[arg-type]
        write_atomic(part.directory / OUTPUTS_FILE, packed.getvalue())
    return Comparison(reports, skipped, tuple(map(str, gates)))


@dataclass(frozen=True)
class Part:
    """An engine directory that belongs to the checkpoint it is compared with; `plan` is that of its graph, None for dense."""

    directory: Path
    passport: EnginePassport
    spec: IOSpec
    plan: Any

    @property
    def dtype(self) -> str:
        """Float dtype of its graph."""
        return self.passport.graph.get("dtype", "float32")

    @property
    def key(self) -> str:
        """Engines with the same key have the same reference."""
        return f"{self.dtype} {self.passport.graph['placement']} {self.spec.max_length} {self.jitter}"

    @property
    def jitter(self) -> float:
        """How the reference is made to round as this engine does: by its float type, and by its backend's quantizer."""
        rounding = QUANTIZER_JITTER.get(self.passport.backend, 0.0) if self.plan else 0.0
        return max(JITTER[self.dtype], rounding)

    @property
    def reference(self) -> dict[str, Any]:
        """Options of `torch_eager.load` for its reference."""
        return {"task": self.spec.task, "scale_dtype": self.dtype, "plan": self.plan}


def open_part(checkpoint: Path, directory: Path) -> Part:
    """An engine directory, checked against its checkpoint; raises `ArtifactError`."""
    passport, spec = load_passport(directory), load_spec(directory)
    plan = plan_of(checkpoint, directory, passport)
    require_from(checkpoint, directory, passport, spec)
    return Part(directory, passport, spec, plan)


def _runnable(parts: Sequence[Part]) -> tuple[list[Part], list[Skipped]]:
    """(engines that load here, the others); `EngineUnavailable` with the reasons where none does."""
    running, skipped = [], []
    for part in parts:
        try:
            with backend(part.passport.backend).load(part.directory):
                running.append(part)
        except EngineUnavailable as error:
            if len(parts) == 1:
                raise
            sha256 = part.passport.engine_sha256
            skipped.append(Skipped(str(part.directory), sha256, part.passport.backend, str(error)))
    if not running:
        raise EngineUnavailable(
            f"nothing could be compared here: {'; '.join(f'{engine.engine}: {engine.reason}' for engine in skipped)}"
        )
    return running, skipped


@dataclass(frozen=True)
class _Measured:
    """The reference's outputs for all samples, and |changes| of them by rounding (`noise`) and by a code's step (`step`)."""

    wanted: Mapping[str, np.ndarray]
    noise: Mapping[str, np.ndarray]
    step: Mapping[str, np.ndarray]
    probes: Expected


def _measure(checkpoint: Path, part: Part, features: Sequence[Features], batch_size: int) -> _Measured:
    spec = part.spec
    samples = probe_samples(features, spec, part.passport.profiles)
    with pytorch.load(checkpoint, **part.reference, exact=True) as reference:
        require_outputs(part.directory, spec, reference.outputs, str(checkpoint))
        wanted = run_all(reference, features, spec, batch_size)
        answers = {name: run_all(reference, [sample], spec) for name, sample in samples.items()}

    def change(count: int, perturbation: Perturbation) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
        """|reference changed - reference|: on at most `count` samples, spread over all, and the largest on each probe."""
        picks = spread(len(features), count)
        with pytorch.load(checkpoint, **part.reference, perturbation=perturbation) as changed:
            outputs = run_all(changed, [features[i] for i in picks], spec, batch_size)
            probed = {name: run_all(changed, [sample] * PROBE_COPIES, spec) for name, sample in samples.items()}
        return (
            {name: _apart(spec, name, outputs[name], wanted[name][picks]) for name in spec.outputs},
            {key: {name: largest(probed[key][name] - answers[key][name]) for name in spec.outputs} for key in samples},
        )

    noise, noise_probes = change(NOISE_SAMPLES, Perturbation(rounding_noise=part.jitter))
    step, step_probes = change(STEP_SAMPLES, Perturbation(one_step_shift=True)) if part.plan else (noise, noise_probes)
    tolerances = {
        key: {
            name: max(
                max_tolerance(wanted[name], noise[name], step[name]),
                MAX_FACTOR * max(noise_probes[key][name], step_probes[key][name]) + floor(answers[key][name]),
            )
            for name in spec.outputs
        }
        for key in samples
    }
    return _Measured(wanted, noise, step, Expected(samples, answers, tolerances))


def _run(
    part: Part, measured: _Measured, features: Sequence[Features], batch_size: int
) -> tuple[dict[str, np.ndarray], list[Probe]]:
    """The engine's outputs for all samples, and its probes."""
    with backend(part.passport.backend).load(part.directory) as loaded:
        require_outputs(part.directory, part.spec, loaded.outputs, "the engine file")
        found = run_all(loaded, features, part.spec, batch_size)
        for name, wanted in measured.wanted.items():
            if wanted.shape != found[name].shape:
                raise ArtifactError(
                    f"{part.directory}: its {name} have shape {found[name].shape[1:]}, those of the checkpoint {wanted.shape[1:]}; "
                    "it was built from another checkpoint"
                )
        tolerances = {
            name: max_tolerance(wanted, measured.noise[name], measured.step[name])
            for name, wanted in measured.wanted.items()
        }
        profiles = part.passport.profiles
        probes = probe(loaded, features, part.spec, profiles, tolerances, measured.probes)
    return found, [finite_probe(found), *probes]


def run_all(engine: Engine, features: Sequence[Features], spec: IOSpec, batch_size: int = 32) -> dict[str, np.ndarray]:
    """Outputs of every sample, in the order of `features`; batches are by length, so that little is padding.

    Outputs with a row for every token are (samples, longest sequence, ...), 0 for padding.
    """
    rows: dict[str, list[Any]] = {name: [None] * len(features) for name in engine.outputs}
    for indices in sorted_batches(features, batch_size):
        outputs = engine.run(pad([features[i] for i in indices], spec.pad_id))
        for name, values in outputs.items():
            for i, value in zip(indices, values, strict=True):
                rows[name][i] = value[: len(features[i]["input_ids"])] if _per_token(spec, name) else value
    return {name: filled(values, 0.0) for name, values in rows.items()}


def _rounding(part: Part) -> str:
    return (
        f"{part.dtype} as {part.passport.backend} rounds" if part.passport.backend in QUANTIZER_JITTER else part.dtype
    )


def _apart(spec: IOSpec, name: str, changed: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """|changed - wanted|; per token the longest sample may not be among them, so `changed` may be shorter."""
    return np.abs(changed - (wanted[:, : changed.shape[1]] if _per_token(spec, name) else wanted))


def _per_token(spec: IOSpec, name: str) -> bool:
    return "sequence" in spec.outputs.get(name, ())


def _report(
    part: Part,
    measured: _Measured,
    found: Mapping[str, np.ndarray],
    probes: Sequence[Probe],
    others: Sequence[tuple[Part, Mapping[str, np.ndarray]]],
    features: Sequence[Features],
    gates: Sequence[Gate],
    beforehand: Mapping[str, float],
) -> ParityReport:
    wanted, spec = measured.wanted, part.spec
    task = TASKS[spec.task]
    metric, labels, groups = task.metric, label_array(features), group_array(features)
    lengths = [len(sample["input_ids"]) for sample in features]
    allowed = context_mask(labels, max(lengths)) if task.output_kind == "span" else None
    scored, scored_reference = scored_outputs(task, found), scored_outputs(task, wanted)
    value = metric_named(metric, spec.labels, groups)
    outputs = [
        compare_output(
            name,
            wanted[name],
            measured.noise[name],
            measured.step[name],
            found[name],
            bool(part.plan),
            output_kind=task.output_kind,
            lengths=lengths if _per_token(spec, name) else None,
            allowed=allowed,
        )
        for name in spec.outputs
    ]
    of_engine, of_reference = value(scored, labels), value(scored_reference, labels)
    quantities = {
        **beforehand,
        "drop": 100.0 * (of_reference - of_engine),
        "flips": 100.0
        * float(np.max([1.0 - (1.0 if output.agreement is None else output.agreement) for output in outputs])),
        "max_abs": float(np.max([output.max_abs for output in outputs])),
    }
    beside = {
        name: tuple(metric_named(name, spec.labels, groups)(values, labels) for values in (scored_reference, scored))
        for name in task.secondary_metrics
    }
    drops = {metric: (of_reference, of_engine), **beside}
    quantities |= {f"drop({name})": 100.0 * (theirs - ours) for name, (theirs, ours) in drops.items()}
    if task.output_kind == "vector":
        quantities["cosine"] = float(cosines(scored_reference, scored).min())
    pairs = []
    for other, theirs in others:
        scored_other = scored_outputs(task, theirs)
        apart = (
            of_engine - value(scored_other, labels),
            paired_interval(metric, scored, scored_other, labels, classes=spec.labels, groups=groups),
        )
        pairs += pair_of(
            (str(other.directory), other.passport.engine_sha256),
            found,
            theirs,
            apart,
            task.output_kind,
            {name: lengths for name in spec.outputs if _per_token(spec, name)},
            allowed,
        )
    return ParityReport(
        engine=str(part.directory),
        engine_sha256=part.passport.engine_sha256,
        backend=part.passport.backend,
        samples=len(features),
        outputs=outputs,
        metric=metric,
        reference_value=of_reference,
        reference_interval=interval(metric, scored_reference, labels, classes=spec.labels, groups=groups),
        engine_value=of_engine,
        engine_interval=interval(metric, scored, labels, classes=spec.labels, groups=groups),
        reason=(
            f"max: {MAX_FACTOR:g} x what the reference changes by when one code of every quantized tensor moves by one step, or by rounding in "
            f"{_rounding(part)}, whichever is more; mean: {MEAN_FACTOR:g} x what that rounding changes it by; "
            f"equal samples: a {1 / QUIET_FACTOR:.0%} share of those that the rounding leaves equal"
        ),
        difference=of_engine - of_reference,
        difference_interval=paired_interval(
            metric, scored, scored_reference, labels, classes=spec.labels, groups=groups
        ),
        beside=beside,
        probes=list(probes),
        gates=[check_gate(gate, quantities) for gate in gates],
        pairs=pairs,
    )
