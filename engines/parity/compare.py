"""Does an engine compute what its checkpoint computes? Compared on real samples, with a tolerance that has a reason.

A quantized network is a staircase: where two correct implementations round a sum differently, a code moves by one step,
and that step travels to the output. So tolerances are measured, on the network and the samples at hand, never guessed.
The reference is PyTorch in float64 (`engines.reference.pytorch`, ``exact``), and what is tolerated comes from two more
runs of it:

* *rounding noise*: the reference in the engine's float type. What it differs by is what rounding alone does here.
* *one-step shift*: one random code of every sample moves by one step in every quantized tensor: the least that a
  quantizer can err.

An engine passes when its largest error is within a small multiple of the largest of both, its mean error within a small
multiple of the noise's, and when, where codes rarely move (float32), it leaves about as many samples exactly alone as
the noise does. The last is the sharp one: an engine that is wrong anywhere, be it one scale of one channel, moves
*every* sample, while rounding leaves most of them alone. In half precision every sample moves by rounding alone; there,
mistakes smaller than the error of a quantizer (one missing pair) do not show in outputs, and only `nxm verify` and the
comparison block by block (`engines.parity.bisect`) find them.

That tolerance always holds. Beside it stand the probes (`engines.parity.probes`) and the gates that the user sets
(`engines.parity.gates`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from engines.base import Engine
from engines.devices import running_on, runtime_here
from engines.memory import reference_memory
from engines.parity.compatibility import require_alike, require_outputs
from engines.parity.decisions import (
    DECIDING,
    Pair,
    Reading,
    agreement,
    apart,
    cosines,
    distance,
    nonfinite_values,
    spread,
)
from engines.parity.gates import Gate, check_gate, embedding_table_drop
from engines.parity.parts import Part, loadable, open_part, per_token, require_some, run_all
from engines.parity.probes import (
    Expected,
    Loaded,
    ProbeResult,
    finite_probe,
    longest_sequence,
    probe,
    probe_samples,
)
from engines.parity.reports import OUTPUTS_FILE, PARITY_FILE, Comparison, ParityReport, report_text, verdict
from engines.parity.tolerance import (
    MAX_FACTOR,
    MEAN_FACTOR,
    UNCHANGED_FACTOR,
    Expectation,
    OutputParity,
    compare_output,
    floor,
    largest,
)
from engines.reference.pytorch import Perturbation
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.tasks import TASKS, Task
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, MAX_ROWS, rows_within
from nxm_export.data.features import Features, group_array, label_array
from nxm_export.data.label_order import require_label_order, rows_to_look_at
from nxm_export.data.metrics import ScoredOutputs, require_scorable, scored_outputs
from nxm_export.data.question_answering import context_mask
from nxm_export.errors import ArtifactError, DataError, EngineError, ParityError
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.memory import available_memory, gigabytes, require_memory

NOISE_SAMPLES, SHIFT_SAMPLES = 256, 64
PROBE_COPIES = 4  # of a probe's sample: its tolerance is measured on as many draws of what is random


def compare(
    checkpoint: str | Path,
    engine: str | Path,
    features: Sequence[Features],
    *,
    gates: Sequence[Gate] = (),
) -> ParityReport:
    """`compare_all` of one engine."""
    return compare_all(checkpoint, [engine], features, gates=gates).reports[0]


def compare_all(
    checkpoint: str | Path,
    engines: Sequence[str | Path],
    features: Sequence[Features],
    *,
    gates: Sequence[Gate] = (),
    batch_size: int = MAX_ROWS,
    numbered: bool = False,
) -> Comparison:
    """Run a checkpoint and engine directories made from it on the same samples; writes ``parity.json`` and
    ``outputs.npz`` beside every engine that runs here.

    `features` are token features with ``labels`` (see `nxm_export.data.examples.encode`); with `numbered` the data has
    numbers for labels, whose order is then looked at. An engine that fails when it runs has no report here, and its
    ``parity.json`` says that it failed, whatever it said before; the others have theirs. Raises `EngineUnavailable`
    when no engine can run here, `EngineError` when none is left, `DataError` for data that does not fit,
    `ArtifactError` for engines of another checkpoint and for engines that cannot be compared with each other,
    `ParityError` for a checkpoint whose own outputs are not finite; then nothing else is written.
    """
    checkpoint = Path(checkpoint)
    if not features:
        raise DataError("no samples to compare on")
    parts = [open_part(checkpoint, Path(engine)) for engine in engines]
    require_alike([(part.directory, part.spec) for part in parts])
    samples = _Samples(features, parts[0].spec, batch_size)
    _require_askable(gates, samples)
    beforehand = {}
    if any(gate.quantity == "embedding_table" for gate in gates):
        beforehand["embedding_table"] = embedding_table_drop(checkpoint)
    running, without_report = loadable(parts)
    samples = replace(samples, batch_tokens=_batch_tokens(checkpoint, running, samples))
    references: dict[str, _Reference] = {}  # engines of one dtype and placement share it
    runs = []
    for part in running:
        if part.key not in references:
            reference = references[part.key] = _measure(checkpoint, part, samples)
            if numbered:
                rows = rows_to_look_at(len(samples.labels))
                logits = scored_outputs(samples.task, reference.outputs)[rows]
                require_label_order(logits, samples.labels[rows], samples.spec.labels, "the data")
        try:
            runs.append(_run(part, references[part.key], samples))
        except EngineError as error:  # of this engine, whatever the others do
            without_report.append(part.without_report(error))
            if len(parts) == 1:
                raise
    require_some(runs, without_report)
    reports = []
    for run in runs:
        others = [other for other in runs if other.part.directory != run.part.directory]
        reports.append(_report(run, others, samples, gates, beforehand))
    texts = [report_text(report) for report in reports]
    for run, text in zip(runs, texts, strict=True):
        write_atomic(run.part.directory / PARITY_FILE, text)
        packed = io.BytesIO()
        np.savez(packed, **{**run.outputs, **samples.answers})  # type: ignore[arg-type]  # names of files, not options
        write_atomic(run.part.directory / OUTPUTS_FILE, packed.getvalue())
    return Comparison(tuple(reports), tuple(without_report), tuple(map(str, gates)))


def _batch_tokens(checkpoint: Path, parts: Sequence[Part], samples: _Samples) -> int:
    """Tokens of a batch at most: the usual budget, or half of it, and so on, where the memory of this machine asks for
    less; raises `EngineError` where not even the longest sample fits alone."""
    longest, available = max(samples.lengths), available_memory()
    tokens = MAX_BATCH_TOKENS
    while True:
        rows = min(len(samples.features), rows_within(longest, tokens, samples.batch_size))
        needed = max([reference_memory(checkpoint, rows * longest), *(part.memory(rows, longest) for part in parts)])
        if available is None or needed <= available:
            return tokens
        if rows == 1:
            break
        tokens //= 2
    purpose = f"comparing {', '.join(str(part.directory) for part in parts)} on 1x{longest} (batch x sequence)"
    require_memory(needed, purpose, "compare on shorter texts, or export with a lower --max-length")
    return tokens


def _beyond_memory(longest: int, needed: int) -> str | None:
    """Why an input of `longest` tokens, which takes `needed` bytes, cannot be tried here; None where it can."""
    available = available_memory()
    if available is None or needed <= available:
        return None
    return (
        f"{longest} tokens need at least {gigabytes(needed)} of memory, and {gigabytes(available)} are available here; "
        "export with a lower --max-length, or compare on a larger machine"
    )


@dataclass(frozen=True)
class _Samples:
    """The samples of a comparison, and how outputs for them are read and scored. `spec` is that of the first engine:
    the others take and give the same."""

    features: Sequence[Features]
    spec: IOSpec
    batch_size: int
    batch_tokens: int = MAX_BATCH_TOKENS

    def run(self, engine: Engine, features: Sequence[Features] | None = None) -> dict[str, np.ndarray]:
        """Outputs of an engine for all samples, or for some `features`."""
        return run_all(
            engine, self.features if features is None else features, self.spec, self.batch_size, self.batch_tokens
        )

    @property
    def task(self) -> Task:
        return TASKS[self.spec.task]

    @cached_property
    def labels(self) -> np.ndarray:
        return label_array(self.features)

    @cached_property
    def groups(self) -> np.ndarray | None:
        return group_array(self.features)

    @cached_property
    def lengths(self) -> list[int]:
        return [len(sample["input_ids"]) for sample in self.features]

    @cached_property
    def allowed(self) -> np.ndarray | None:
        return context_mask(self.labels, max(self.lengths)) if self.task.output_kind == "span" else None

    @property
    def answers(self) -> dict[str, np.ndarray]:
        """What ``outputs.npz`` has beside the outputs."""
        return {"labels": self.labels} | ({} if self.groups is None else {"groups": self.groups})

    def reading(self, output: str) -> Reading:
        lengths = self.lengths if per_token(self.spec, output) else None
        return Reading(self.task.output_kind, lengths, self.allowed)

    def scored(self, outputs: Mapping[str, np.ndarray]) -> ScoredOutputs:
        return ScoredOutputs(scored_outputs(self.task, outputs), self.labels, self.spec.labels, self.groups)


def _require_askable(gates: Sequence[Gate], samples: _Samples) -> None:
    """Raise `DataError` for a gate on what the task or its data have not."""
    task = samples.task
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
            require_scorable(gate.metric or task.metric, samples.labels, samples.spec.labels)


@dataclass(frozen=True)
class _Reference:
    """What the checkpoint gives for all samples, by output, and for those of the probes."""

    expectations: Mapping[str, Expectation]
    probes: Expected

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        return {name: expectation.values for name, expectation in self.expectations.items()}


@dataclass(frozen=True)
class _Change:
    """|reference changed - reference|: of some of the samples by output, and the largest on each probe's sample."""

    samples: Mapping[str, np.ndarray]
    probes: Mapping[str, Mapping[str, float]]


def _measure(checkpoint: Path, part: Part, samples: _Samples) -> _Reference:
    spec = part.spec
    longest = longest_sequence(spec, part.passport.profiles)
    beyond = _beyond_memory(longest, reference_memory(checkpoint, longest))
    probed = probe_samples(samples.features, spec, part.passport.profiles, maximum=beyond is None)
    with part.load_reference(checkpoint, exact=True) as reference:
        require_outputs(part.directory, spec, reference.outputs, str(checkpoint))
        expected = samples.run(reference)
        answers = {name: samples.run(reference, [sample]) for name, sample in probed.items()}
    for outputs in (expected, *answers.values()):
        _require_finite(checkpoint, outputs)

    def change(perturbation: Perturbation, count: int) -> _Change:
        """By at most `count` samples, spread over all."""
        picks = spread(len(samples.features), count)
        draws = 1 if perturbation == Perturbation() else PROBE_COPIES  # float32 alone rounds every copy alike
        with part.load_reference(checkpoint, perturbation=perturbation) as changed:
            outputs = samples.run(changed, [samples.features[i] for i in picks])
            copies = {name: samples.run(changed, [sample] * draws) for name, sample in probed.items()}
        for given in (outputs, *copies.values()):
            _require_finite(checkpoint, given)
        return _Change(
            {
                name: apart(_cut_to(spec, name, expected[name][picks], outputs[name]), outputs[name])
                for name in spec.outputs
            },
            {
                key: {name: largest(apart(answers[key][name], copies[key][name])) for name in spec.outputs}
                for key in probed
            },
        )

    noise = change(part.rounding_noise, NOISE_SAMPLES)
    shift = change(Perturbation(one_step_shift=True), SHIFT_SAMPLES) if part.plan else noise
    expectations = {
        name: Expectation(expected[name], noise.samples[name], shift.samples[name]) for name in spec.outputs
    }
    tolerances = {
        key: {
            name: max(
                expectations[name].max_tolerance,
                MAX_FACTOR * max(noise.probes[key][name], shift.probes[key][name]) + floor(answers[key][name]),
            )
            for name in spec.outputs
        }
        for key in probed
    }
    return _Reference(expectations, Expected(probed, answers, tolerances, beyond))


def _require_finite(checkpoint: Path, outputs: Mapping[str, np.ndarray]) -> None:
    for name, values in outputs.items():
        if count := nonfinite_values(values):
            raise ParityError(
                f"{checkpoint}: the checkpoint itself gives NaN or infinity in PyTorch ({count} "
                f"values of {name}), so there is "
                "nothing to compare an engine with; compress it again"
            )


@dataclass(frozen=True)
class _Run:
    """An engine's outputs for all samples, what its probes gave, and the reference that it is held against."""

    part: Part
    reference: _Reference
    outputs: Mapping[str, np.ndarray]
    probes: tuple[ProbeResult, ...]


def _run(part: Part, reference: _Reference, samples: _Samples) -> _Run:
    with part.load() as engine:
        require_outputs(part.directory, part.spec, engine.outputs, "the engine file")
        outputs = samples.run(engine)
        for name, expected in reference.outputs.items():
            if expected.shape != outputs[name].shape:
                raise ArtifactError(
                    f"{part.directory}: its {name} have shape {outputs[name].shape[1:]}, those of the checkpoint "
                    f"{expected.shape[1:]}; it was built from another checkpoint"
                )
        tolerances = {name: expectation.max_tolerance for name, expectation in reference.expectations.items()}
        loaded = Loaded(engine, part.spec, part.passport.profiles, part.passport.shapes)
        longest = loaded.longest_sequence
        beyond = reference.probes.beyond or _beyond_memory(longest, part.memory(1, longest))
        probes = probe(loaded, samples.features, tolerances, replace(reference.probes, beyond=beyond))
    return _Run(part, reference, outputs, (finite_probe(outputs), *probes))


def _report(
    run: _Run, others: Sequence[_Run], samples: _Samples, gates: Sequence[Gate], beforehand: Mapping[str, float]
) -> ParityReport:
    """What a run says about its engine; `beforehand` are quantities of gates that were known before it."""
    part, metric = run.part, samples.task.metric
    scored, scored_reference = samples.scored(run.outputs), samples.scored(run.reference.outputs)
    outputs = tuple(
        compare_output(name, expectation, run.outputs[name], samples.reading(name), quantized=bool(part.plan))
        for name, expectation in run.reference.expectations.items()
    )
    scores = {
        name: (scored_reference.value(name), scored.value(name)) for name in (metric, *samples.task.secondary_metrics)
    }
    of_reference, of_engine = scores[metric]
    quantities = {**beforehand, **_quantities(outputs, scores, metric)}
    if samples.task.output_kind == "vector":
        quantities["cosine"] = float(cosines(scored_reference.outputs, scored.outputs).min())
    checked = tuple(check_gate(gate, quantities) for gate in gates)
    return ParityReport(
        passed=verdict(outputs, run.probes, checked),
        engine=str(part.directory),
        engine_sha256=part.passport.engine_sha256,
        backend=part.passport.backend,
        samples=len(samples.features),
        outputs=outputs,
        metric=metric,
        reference_value=of_reference,
        reference_interval=_interval(scored_reference.interval(metric)),
        engine_value=_number(of_engine),
        engine_interval=_interval(scored.interval(metric)),
        reason=_tolerance_text(part),
        difference=_number(of_engine - of_reference),
        difference_interval=_interval(scored.interval_against(scored_reference, metric)),
        secondary_metrics={
            name: (_number(theirs), _number(ours)) for name, (theirs, ours) in scores.items() if name != metric
        },
        probes=run.probes,
        gates=checked,
        pairs=tuple(pair for other in others for pair in _pairs(run, other, samples)),
        contents_sha256=part.passport.contents_sha256,
        machine=running_on(part.passport),
        runtime=runtime_here(part.passport),
    )


def _quantities(
    outputs: Sequence[OutputParity], scores: Mapping[str, tuple[float, float]], metric: str
) -> dict[str, float]:
    """What gates may be about, by `Gate.key`; NaN where the outputs leave no number. `scores` are (checkpoint,
    engine)."""
    drops = {name: 100.0 * (theirs - ours) for name, (theirs, ours) in scores.items()}
    return {
        "drop": drops[metric],
        "flips": _flips(outputs),
        "max_abs": float(np.max([np.nan if output.max_abs is None else output.max_abs for output in outputs])),
        **{f"drop({name})": drop for name, drop in drops.items()},
    }


def _flips(outputs: Sequence[OutputParity]) -> float:
    """The largest share of decisions that changed, in percent; NaN where an output holds NaN, which decides nothing,
    and where no output decides anything."""
    if any(output.nonfinite for output in outputs):
        return math.nan
    return max(
        (100.0 * (1.0 - output.agreement) for output in outputs if output.agreement is not None), default=math.nan
    )


def _pairs(run: _Run, other: _Run, samples: _Samples) -> list[Pair]:
    """The outputs of an engine against those of another one."""
    scored, scored_other = samples.scored(run.outputs), samples.scored(other.outputs)
    metric = samples.task.metric
    difference = _number(scored.value(metric) - scored_other.value(metric))
    difference_interval = _interval(scored.interval_against(scored_other, metric))
    pairs = []
    for name, actual in run.outputs.items():
        apart = distance(other.outputs[name], actual)
        pairs.append(
            Pair(
                other=str(other.part.directory),
                other_sha256=other.part.passport.engine_sha256,
                output=name,
                max_abs=apart.max_abs,
                mean_abs=apart.mean_abs,
                cosine=apart.cosine,
                agreement=agreement(other.outputs[name], actual, samples.reading(name)),
                difference=difference,
                difference_interval=difference_interval,
            )
        )
    return pairs


def _tolerance_text(part: Part) -> str:
    return (
        f"max: {MAX_FACTOR:g} x what the reference changes by when one code of every quantized "
        "tensor moves by one step, or by "
        f"rounding in {part.rounding_text}, whichever is more; mean: {MEAN_FACTOR:g} x what that "
        "rounding changes it by; "
        f"equal samples: a {1 / UNCHANGED_FACTOR:.0%} share of those that the rounding leaves equal"
    )


def _cut_to(spec: IOSpec, name: str, expected: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """`expected` as long as `changed`: per token, the longest sample may not be among those that were run again."""
    return expected[:, : changed.shape[1]] if per_token(spec, name) else expected


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _interval(bounds: tuple[float, float]) -> tuple[float, float] | None:
    """None for the NaN of outputs with a NaN and of too few samples."""
    return bounds if np.isfinite(bounds).all() else None
