"""Does an engine compute what its checkpoint computes? Compared on real samples, with a tolerance that has a reason.

A quantized network is a staircase: where two correct implementations round a sum differently, a code moves by one step,
and that step travels to the output. So tolerances are measured, on the network and the samples at hand, never guessed.
The reference is PyTorch in float64 (`engines.torch_eager`, ``exact``), and what is tolerated comes from two more runs of it:

* *noise*: the reference in the engine's float type. What it differs by is what rounding alone does here.
* *step*: one random code of every sample moves by one step in every quantized tensor: the least that a quantizer can err.

An engine passes when its largest error is within a small multiple of the largest of both, its mean error within a small
multiple of the noise's, and when, where codes rarely move (float32), it leaves about as many samples exactly alone as the
noise does. The last is the sharp one: an engine that is wrong anywhere, be it one scale of one channel, moves *every*
sample, while rounding leaves most of them alone. In half precision every sample moves by rounding alone; there, mistakes
smaller than a quantizer's own error (one missing pair) do not show in outputs, and only `nxm verify` finds them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines import torch_eager
from engines.base import Engine, backend
from engines.passport import EnginePassport, load_passport, plan_summary
from nxm_export.checkpoint import PLAN_FILE, open_checkpoint
from nxm_export.data import Features, filled, label_array, pad, sorted_batches
from nxm_export.errors import ArtifactError, DataError, ParityError
from nxm_export.families import TASKS
from nxm_export.metrics import interval, metric_named
from nxm_export.run_dir import json_text, write_atomic
from nxm_export.spec import IOSpec, load_spec

SCHEMA = "nxm-parity/1"
PARITY_FILE = "parity.json"
OUTPUTS_FILE = "outputs.npz"  # what the engine gave for every sample, and the labels: paired statistics need both
# How the reference is made to round as the engine's float type does: float32 it computes in itself; of the shorter types,
# half a unit in the last place at the input of every linear layer. (Sixteen times more changes nothing: all codes that
# can move already do.)
JITTER = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
MAX_FACTOR = 3.0  # several codes may move in one sample
MEAN_FACTOR = 2.0  # noise and engine are two draws of a random quantity, from different implementations
QUIET = 1e-4  # of the largest output: float32 sums stay below, a code that moves does not
QUIET_FACTOR = 4.0  # an engine may move codes in more samples than the noise run does, but not in nearly all
QUIET_SAMPLES = 20  # fewer are no statistics: were 20 expected, chance alone would leave under 5 once in 60,000 runs
NOISE_SAMPLES, STEP_SAMPLES = 256, 64


@dataclass(frozen=True)
class OutputParity:
    """One output of an engine against the reference.

    `agreement` is the share of equal argmax (1.0 without classes), `quiet` the share of samples that are equal to within
    float32 rounding. A changed class is excused only where the reference's own margin is within the tolerance.
    """

    output: str
    max_abs: float
    mean_abs: float
    cosine: float
    agreement: float
    worst_sample: int
    max_tolerance: float
    mean_tolerance: float
    unexcused_flips: int
    passed: bool
    quiet: float
    quiet_required: float


@dataclass(frozen=True)
class ParityReport:
    """An engine against its checkpoint, on `samples` samples; `metric` values are of both, with 95 % intervals."""

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

    @property
    def passed(self) -> bool:
        """True when every output is within its tolerance."""
        return all(output.passed for output in self.outputs)

    def require(self) -> None:
        """Raise `ParityError` unless `passed`."""
        for output in self.outputs:
            if not output.passed:
                raise ParityError(
                    f"{self.engine}: {output.output} differs from the checkpoint: max {output.max_abs:.4g} (tolerated {output.max_tolerance:.4g}), "
                    f"mean {output.mean_abs:.4g} (tolerated {output.mean_tolerance:.4g}), {output.quiet:.1%} of the samples equal "
                    f"(required {output.quiet_required:.1%}), {output.unexcused_flips} classes changed beyond the tolerance, "
                    f"worst at sample {output.worst_sample}. Verify the graph, and build the engine again from a new export"
                )

    def to_dict(self) -> dict[str, Any]:
        """The form of ``parity.json`` and ``--json``."""
        return {"schema": SCHEMA, "passed": self.passed, **asdict(self)}


def compare(
    checkpoint: str | Path, engine: str | Path, features: Sequence[Features], *, batch_size: int = 32
) -> ParityReport:
    """Run a checkpoint and an engine directory made from it on the same samples; writes ``parity.json`` and
    ``outputs.npz`` beside the engine.

    `features` are token features with ``labels`` (see `nxm_export.data.encode`). Raises `EngineUnavailable` when the
    engine cannot run here, `DataError` for data that does not fit, `ArtifactError` for an engine of another checkpoint.
    """
    checkpoint, directory = Path(checkpoint), Path(engine)
    passport, spec = load_passport(directory), load_spec(directory)
    if not features:
        raise DataError("no samples to compare on")
    dtype = passport.graph.get("dtype", "float32")
    options = {"task": spec.task, "scale_dtype": dtype, "plan": _plan_of(checkpoint, directory, passport)}
    with backend(passport.backend).load(directory) as loaded:
        found = run_all(loaded, features, spec, batch_size)
    with torch_eager.load(checkpoint, **options, exact=True) as reference:
        wanted = run_all(reference, features, spec, batch_size)
    for name in spec.outputs:
        if wanted[name].shape != found[name].shape:
            raise ArtifactError(
                f"{directory}: its {name} have shape {found[name].shape[1:]}, those of {checkpoint} {wanted[name].shape[1:]}; "
                "it was built from another checkpoint"
            )

    def change(count: int, **change_options: Any) -> dict[str, np.ndarray]:
        """|reference changed - reference| on at most `count` samples, spread over all."""
        picks = _spread(len(features), count)
        with torch_eager.load(checkpoint, **options, **change_options) as changed:
            outputs = run_all(changed, [features[i] for i in picks], spec, batch_size)
        changes = {}
        for name in spec.outputs:
            same = wanted[name][picks]
            if _per_token(spec, name):  # the longest sample may not be among them
                same = same[:, : outputs[name].shape[1]]
            changes[name] = np.abs(outputs[name] - same)
        return changes

    noise = change(NOISE_SAMPLES, jitter=JITTER[dtype])
    step = change(STEP_SAMPLES, nudge=True) if options["plan"] else noise
    report = _report(directory, passport, spec, wanted, noise, step, found, features)
    write_atomic(directory / PARITY_FILE, json_text(report.to_dict()))
    arrays: dict[str, Any] = {**found, "labels": label_array(features)}
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    write_atomic(directory / OUTPUTS_FILE, packed.getvalue())
    return report


def _plan_of(checkpoint: Path, directory: Path, passport: EnginePassport) -> Any:
    """The checkpoint's plan as the engine's graph holds it, None for dense ones; `ArtifactError` where they do not belong together."""
    compressed = (checkpoint / PLAN_FILE).is_file()
    if "placement" not in passport.graph:
        raise ArtifactError(
            f"{directory} was built from a graph that nxm-export did not make; it has no checkpoint to equal"
        )
    if compressed != bool(passport.plan):
        kinds = {True: "a compressed model", False: "a dense model"}
        raise ArtifactError(
            f"{directory} was built from {kinds[bool(passport.plan)]}, and {checkpoint} is {kinds[compressed]}; give the one it was exported from"
        )
    if not compressed:
        return None
    plan = open_checkpoint(checkpoint).plan.at_placement(passport.graph["placement"])
    if plan_summary(plan) != passport.plan:
        raise ArtifactError(
            f"{directory} was built for the plan {passport.plan.get('options')}, and {checkpoint} has {plan.pattern_counts}; give the one it was exported from"
        )
    return plan


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


def _spread(samples: int, count: int) -> np.ndarray:
    """At most `count` indices, evenly over all samples."""
    return np.linspace(0, samples - 1, min(count, samples)).astype(int)


def _per_token(spec: IOSpec, name: str) -> bool:
    return "sequence" in spec.outputs.get(name, ())


def _report(
    directory: Path,
    passport: EnginePassport,
    spec: IOSpec,
    wanted: Mapping[str, np.ndarray],
    noise: Mapping[str, np.ndarray],
    step: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    features: Sequence[Features],
) -> ParityReport:
    task = TASKS[spec.task]
    metric, labels = task.metric, label_array(features)
    first, lengths = next(iter(spec.outputs)), [len(sample["input_ids"]) for sample in features]
    value = metric_named(metric, spec.labels)
    return ParityReport(
        engine=str(directory),
        engine_sha256=passport.engine_sha256,
        backend=passport.backend,
        samples=len(features),
        outputs=[
            _compare_output(
                name,
                wanted[name],
                noise[name],
                step[name],
                found[name],
                task.link,
                lengths if _per_token(spec, name) else None,
            )
            for name in spec.outputs
        ],
        metric=metric,
        reference_value=value(wanted[first], labels),
        reference_interval=interval(metric, wanted[first], labels, classes=spec.labels),
        engine_value=value(found[first], labels),
        engine_interval=interval(metric, found[first], labels, classes=spec.labels),
        reason=(
            f"max: {MAX_FACTOR:g} x what the reference changes by when one code of every quantized tensor moves by one step, or by rounding in "
            f"{passport.graph.get('dtype', 'float32')}, whichever is more; mean: {MEAN_FACTOR:g} x what that rounding changes it by; "
            f"equal samples: a {1 / QUIET_FACTOR:.0%} share of those that the rounding leaves equal"
        ),
    )


def _compare_output(
    name: str,
    wanted: np.ndarray,
    noise: np.ndarray,
    step: np.ndarray,
    found: np.ndarray,
    link: str = "softmax",
    lengths: Sequence[int] | None = None,
) -> OutputParity:
    """`noise` and `step` are absolute changes of the reference. NaN fails: it is never within a tolerance.

    `link` is the task's. `lengths` are the samples' in tokens where the output has a row for every token: what stands
    behind them is 0 in all four and counts neither for a mean nor as a decision.
    """
    samples = len(wanted)
    error = np.abs(found - wanted)
    floor = QUIET * float(np.abs(wanted).max())
    max_tolerance = MAX_FACTOR * float(max(noise.max(), step.max())) + floor
    all_lengths = None if lengths is None else np.asarray(lengths)
    noise_lengths = None if all_lengths is None else all_lengths[_spread(samples, len(noise))]
    mean = _mean(error, all_lengths)
    # With few samples, one more of them with a moved code is no surprise.
    mean_tolerance = MEAN_FACTOR * (_mean(noise, noise_lengths) + float(step.max()) / samples) + floor
    quiet, quiet_noise = _quiet(error, floor), _quiet(noise, floor)
    quiet_required = quiet_noise / QUIET_FACTOR if quiet_noise * samples >= QUIET_SAMPLES else 0.0
    flipped, margin = _decisions(wanted, found, link)
    if all_lengths is not None:
        real = np.arange(wanted.shape[1]) < all_lengths[:, None]
        flipped, margin = flipped[real], margin[real]
    unexcused = int((flipped & ~(margin <= 2 * max_tolerance)).sum())
    within = bool(error.max() <= max_tolerance) and mean <= mean_tolerance and quiet >= quiet_required
    norms = float(np.linalg.norm(wanted) * np.linalg.norm(found))
    return OutputParity(
        output=name,
        max_abs=float(error.max()),
        mean_abs=mean,
        cosine=float((wanted * found).sum() / norms) if norms else 1.0,
        agreement=float(1.0 - flipped.mean()),
        worst_sample=int(error.reshape(samples, -1).max(axis=1).argmax()),
        max_tolerance=max_tolerance,
        mean_tolerance=mean_tolerance,
        unexcused_flips=unexcused,
        passed=within and unexcused == 0,
        quiet=quiet,
        quiet_required=quiet_required,
    )


def _mean(change: np.ndarray, lengths: np.ndarray | None) -> float:
    """Mean of a change (samples, ...), without what stands behind a sample's length in tokens."""
    if lengths is None:
        return float(change.mean())
    return float(change.sum() / (lengths.sum() * np.prod(change.shape[2:])))


def _decisions(wanted: np.ndarray, found: np.ndarray, link: str) -> tuple[np.ndarray, np.ndarray]:
    """(which decisions differ, the reference's margin of each): the class of the largest logit, or for every label whether
    its logit is above 0; scores decide nothing. The margin is such that errors up to half of it change no decision."""
    if link == "sigmoid":
        return (wanted > 0) != (found > 0), 2 * np.abs(wanted)
    if link != "softmax" or wanted.shape[-1] == 1:
        return np.zeros(len(wanted), bool), np.full(len(wanted), np.inf)
    top = np.sort(wanted, axis=-1)
    # Both logits may move, towards each other.
    return wanted.argmax(-1) != found.argmax(-1), top[..., -1] - top[..., -2]


def _quiet(error: np.ndarray, floor: float) -> float:
    """Share of samples whose outputs are all within `floor`."""
    return float((error.reshape(len(error), -1) <= floor).all(axis=1).mean())
