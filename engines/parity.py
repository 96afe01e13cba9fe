"""Does an engine compute what its checkpoint computes? Compared on real samples, with a tolerance that has a reason.

A quantized network is a staircase: where two correct implementations round a sum differently, a code moves by one step,
and that step travels to the output. So the tolerance is measured, not guessed: the reference is run again with the input
of every linear layer perturbed by a relative error of the size of the engine's arithmetic (`JITTER`). An engine may
differ from the reference by a small multiple of what the reference then differs from itself; beyond that it is another
function. A changed class is excused only where the reference's own margin is within the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines import torch_eager
from engines.base import Engine, backend
from engines.passport import EnginePassport, load_passport
from nxm_export.checkpoint import PLAN_FILE, open_checkpoint
from nxm_export.data import Features, pad, sorted_batches
from nxm_export.errors import DataError, ParityError
from nxm_export.families import TASKS
from nxm_export.metrics import interval, metric_named
from nxm_export.run_dir import write_atomic
from nxm_export.spec import IOSpec, load_spec

SCHEMA = "nxm-parity/1"
PARITY_FILE = "parity.json"
OUTPUTS_FILE = "outputs.npz"  # what the engine gave for every sample, and the labels: paired statistics need both
# Relative error of one linear layer's input under another, equally right, order of summation: a few units in the last
# place, times the square root of the hundreds of terms of a sum.
JITTER = {"float32": 2.0**-20, "float16": 2.0**-9, "bfloat16": 2.0**-6}
MAX_FACTOR, MEAN_FACTOR = 3.0, 2.0  # the jittered run is one draw of a random quantity, the engine another
FLOOR = 1e-4  # float32 heads of float graphs differ by this much and no code moves


@dataclass(frozen=True)
class OutputParity:
    """One output of an engine against the reference. `agreement` is the share of equal argmax (1.0 without classes)."""

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
                    f"mean {output.mean_abs:.4g} (tolerated {output.mean_tolerance:.4g}), {output.unexcused_flips} classes changed beyond it, "
                    f"worst at sample {output.worst_sample}"
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
    engine cannot run here, `DataError` for data that does not fit.
    """
    checkpoint, directory = Path(checkpoint), Path(engine)
    passport, spec = load_passport(directory), load_spec(directory)
    if not features:
        raise DataError("no samples to compare on")
    with backend(passport.backend).load(directory) as loaded:
        found = run_all(loaded, features, spec, batch_size)
    dtype = passport.graph.get("dtype", "float32")
    options: dict[str, Any] = {"task": spec.task, "scale_dtype": dtype}
    if (checkpoint / PLAN_FILE).is_file():
        options["plan"] = open_checkpoint(checkpoint).plan.at_placement(passport.graph["placement"])
    with torch_eager.load(checkpoint, **options) as reference:
        wanted = run_all(reference, features, spec, batch_size)
    with torch_eager.load(checkpoint, **options, jitter=JITTER[dtype]) as perturbed:
        noise = run_all(perturbed, features, spec, batch_size)
    report = _report(directory, passport, spec, wanted, noise, found, features)
    write_atomic(directory / PARITY_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    arrays: dict[str, Any] = {**found, "labels": np.array([sample["labels"] for sample in features])}
    np.savez(directory / OUTPUTS_FILE, **arrays)
    return report


def run_all(engine: Engine, features: Sequence[Features], spec: IOSpec, batch_size: int = 32) -> dict[str, np.ndarray]:
    """Outputs of every sample, in the order of `features`; batches are by length, so that little is padding."""
    rows: dict[str, list[Any]] = {name: [None] * len(features) for name in engine.outputs}
    for indices in sorted_batches(features, batch_size):
        outputs = engine.run(pad([features[i] for i in indices], spec.pad_id))
        for name, values in outputs.items():
            for i, value in zip(indices, values, strict=True):
                rows[name][i] = value
    return {name: np.stack(values) for name, values in rows.items()}


def _report(
    directory: Path,
    passport: EnginePassport,
    spec: IOSpec,
    wanted: Mapping[str, np.ndarray],
    noise: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    features: Sequence[Features],
) -> ParityReport:
    metric = TASKS[spec.task].metric
    labels = np.array([sample["labels"] for sample in features])
    first = next(iter(spec.outputs))
    value = metric_named(metric)
    return ParityReport(
        engine=str(directory),
        engine_sha256=passport.engine_sha256,
        backend=passport.backend,
        samples=len(features),
        outputs=[_compare_output(name, wanted[name], noise[name], found[name]) for name in spec.outputs],
        metric=metric,
        reference_value=value(wanted[first], labels),
        reference_interval=interval(metric, wanted[first], labels),
        engine_value=value(found[first], labels),
        engine_interval=interval(metric, found[first], labels),
        reason=(
            f"{MAX_FACTOR:g} x the largest and {MEAN_FACTOR:g} x the mean change of the reference itself when the input of every linear layer "
            f"moves by {JITTER[passport.graph.get('dtype', 'float32')]:.1e} (rounding of {passport.graph.get('dtype', 'float32')} sums): codes then move by one step"
        ),
    )


def _compare_output(name: str, wanted: np.ndarray, noise: np.ndarray, found: np.ndarray) -> OutputParity:
    """NaN fails: a comparison with NaN is never within a tolerance."""
    error, floor = np.abs(found - wanted), np.abs(noise - wanted)
    max_tolerance, mean_tolerance = MAX_FACTOR * float(floor.max()) + FLOOR, MEAN_FACTOR * float(floor.mean()) + FLOOR
    classes = wanted.shape[-1] > 1
    flipped = wanted.argmax(-1) != found.argmax(-1) if classes else np.zeros(len(wanted), bool)
    top = np.sort(wanted, axis=-1)
    margin = top[..., -1] - top[..., -2] if classes else np.full(len(wanted), np.inf)
    unexcused = int((flipped & ~(margin <= 2 * max_tolerance)).sum())  # both logits may move, towards each other
    within = bool(error.max() <= max_tolerance) and bool(error.mean() <= mean_tolerance)
    norms = float(np.linalg.norm(wanted) * np.linalg.norm(found))
    return OutputParity(
        output=name,
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        cosine=float((wanted * found).sum() / norms) if norms else 1.0,
        agreement=float(1.0 - flipped.mean()),
        worst_sample=int(error.reshape(len(error), -1).max(axis=1).argmax()),
        max_tolerance=max_tolerance,
        mean_tolerance=mean_tolerance,
        unexcused_flips=unexcused,
        passed=within and unexcused == 0,
    )
