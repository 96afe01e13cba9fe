"""Which encoder block does an engine compute wrongly? Compared with PyTorch at block boundaries, each block by itself.

Errors accumulate: behind a wrong block all others look wrong, and behind many right ones rounding has moved many codes.
So every block of the reference is also given what the *engine's* block read, and the two results are compared: what
differs then is the block's *isolated* error, whatever came before. It is judged as outputs are
(`engines.parity.tolerance`), against the same two changes of the reference, measured in that block alone; here a token
is a sample. A block by itself rounds little, so that mistakes show that no output would, in half precision too. The
*accumulated* error is given with it.

The first block that fails is where the two part. The head (all behind the last block) and what the first block reads
are treated alike. ``bisect.json`` beside the engine has the result and names the engine's sha256.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.parity.bisect_reports import (
    BISECT_FILE,
    SCHEMA,
    BisectReport,
    BlockParity,
    first_diverging,
)
from engines.parity.block_outputs import (
    BlockBoundaries,
    BlockOutputEngine,
    built_with_block_outputs,
    ort_with_block_outputs,
)
from engines.parity.compatibility import require_outputs
from engines.parity.decisions import spread
from engines.parity.parts import Part, open_part
from engines.parity.tolerance import MAX_FACTOR, MEAN_FACTOR, UNCHANGED, UNCHANGED_FACTOR, UNCHANGED_SAMPLES
from engines.reference.pytorch import EMBEDDINGS, Perturbation, TorchEngine
from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.families import FAMILIES
from nxm_export.data.features import Features, pad, sorted_batches
from nxm_export.errors import DataError
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import encode

HEAD = "head"
SAMPLES = 32
BATCH, BATCH_TOKENS = 8, 8192  # samples, and tokens: what crosses every boundary is held for seven runs
Values = dict[str, list[np.ndarray]]  # boundary -> (tokens, features) of every sample of a batch


def bisect(
    checkpoint: str | Path, engine: str | Path, features: Sequence[Features], *, graph: Path | None = None
) -> BisectReport:
    """Compare a checkpoint and an engine directory block by block, on at most `SAMPLES` samples; writes
    ``bisect.json``.

    `graph` is the ONNX file that an engine of another backend than ort was built from: it is built again with the block
    outputs. Raises `EngineUnavailable` where that cannot be done here, `ArtifactError` for an engine of another
    checkpoint.
    """
    if not features:
        raise DataError("no samples to compare on")
    checkpoint = Path(checkpoint)
    part = open_part(checkpoint, Path(engine))
    boundaries = BlockBoundaries.of(FAMILIES[part.spec.model_type], read_config(checkpoint))
    samples = [features[i] for i in spread(len(features), SAMPLES)]
    tallies = {name: _Boundary() for name in (EMBEDDINGS, *boundaries.names, HEAD)}
    with tempfile.TemporaryDirectory() as scratch:
        opened = _with_block_outputs(part, boundaries, graph, Path(scratch))
        equal, apart = _gather(tallies, part, opened, checkpoint, samples)
    blocks = tuple(tally.judged(name, quantized=bool(part.plan)) for name, tally in tallies.items())
    first = first_diverging(blocks)
    problem = None if equal else tallies[HEAD].problem_of(apart, quantized=bool(part.plan))
    report = BisectReport(
        passed=first is None and len(blocks) > 0 and problem is None,
        engine=str(part.directory),
        engine_sha256=part.passport.engine_sha256,
        backend=part.passport.backend,
        samples=len(samples),
        tokens=sum(len(sample["input_ids"]) for sample in samples),
        first_diverging=first,
        kernels_changed=None if opened.kernels is None else bool(opened.kernels),
        kernels=opened.kernels,
        outputs_equal=equal,
        blocks=blocks,
        reason=_tolerance_text(part),
        outputs_problem=problem,
    )
    write_atomic(part.directory / BISECT_FILE, encode(report, SCHEMA))
    return report


def _with_block_outputs(
    part: Part, boundaries: BlockBoundaries, graph: Path | None, scratch: Path
) -> BlockOutputEngine:
    if part.passport.backend == "ort":
        return ort_with_block_outputs(part.directory, part.passport, boundaries, scratch)
    if graph is None:
        raise DataError(f"{part.directory}: bisecting this engine needs the graph that it was built from")
    return built_with_block_outputs(part.directory, part.passport, boundaries, graph, scratch)


def _gather(
    tallies: Mapping[str, _Boundary],
    part: Part,
    opened: BlockOutputEngine,
    checkpoint: Path,
    samples: Sequence[Features],
) -> tuple[bool, _Differences]:
    """Run engine and reference on all samples and tally what differs; returns whether the engine itself gives the same
    outputs as the one with block outputs, bit for bit, and their differences at real tokens."""
    spec, equal, apart = part.spec, True, _Differences()
    with ExitStack() as stack:
        engine, whole = stack.enter_context(opened.engine), stack.enter_context(part.load())
        noisy = part.load_reference(checkpoint, perturbation=Perturbation(part.rounding, everywhere=True))
        references: dict[str, TorchEngine] = {
            "exact": stack.enter_context(part.load_reference(checkpoint, exact=True)),
            "rounding_noise": stack.enter_context(noisy),
            "one_step_shift": stack.enter_context(
                part.load_reference(checkpoint, perturbation=Perturbation(one_step_shift=True))
            ),
        }
        require_outputs(part.directory, spec, whole.outputs, "the engine file")
        require_outputs(part.directory, spec, references["exact"].outputs, str(checkpoint))
        for indices in sorted_batches(samples, BATCH, BATCH_TOKENS):
            feeds = pad([samples[i] for i in indices], spec.pad_id)
            actual = engine.run(feeds)
            own = whole.run(feeds)
            equal &= all(np.array_equal(actual[name], array) for name, array in own.items())
            crossed = {boundary: actual[name] for boundary, name in opened.names.items()}
            outputs = {name: actual[name] for name in spec.outputs}
            runs = {
                name: _reference_run(reference, feeds, crossed, spec.outputs) for name, reference in references.items()
            }
            joined = _joined(outputs, crossed, spec.outputs, feeds)
            _tally(tallies, joined, runs)
            alone = _joined({name: own[name] for name in spec.outputs}, {}, spec.outputs, feeds)
            for values, engine_values in zip(joined[HEAD], alone[HEAD], strict=True):
                apart.add(values, engine_values)
    return bool(equal), apart


def _tolerance_text(part: Part) -> str:
    return (
        f"a block's isolated error: max within {MAX_FACTOR:g} x what the block changes by when one "
        "code of each of its quantized "
        f"tensors moves by one step, or by rounding in {part.dtype}; mean within {MEAN_FACTOR:g} x "
        "that rounding; tokens equal: a "
        f"{1 / UNCHANGED_FACTOR:.0%} share of those that the rounding leaves equal"
    )


@dataclass(frozen=True)
class _ReferenceRun:
    """One batch of the reference: every block given what the block before it wrote, and given what the engine's block
    read."""

    accumulated: Values
    isolated: Values


def _reference_run(
    reference: TorchEngine,
    feeds: Mapping[str, np.ndarray],
    crossed: Mapping[str, np.ndarray],
    axes: Mapping[str, Sequence[str]],
) -> _ReferenceRun:
    through, alone = reference.run_blocks(feeds, None), reference.run_blocks(feeds, crossed)
    return _ReferenceRun(_joined(*through, axes, feeds), _joined(*alone, axes, feeds))


def _joined(
    outputs: Mapping[str, np.ndarray],
    crossed: Mapping[str, np.ndarray],
    axes: Mapping[str, Sequence[str]],
    feeds: Mapping[str, np.ndarray],
) -> Values:
    """Real tokens of every sample at every boundary; all outputs together are the head, one row of values per
    sample."""
    masks = feeds["attention_mask"].astype(bool)
    values = {name: [row[mask] for row, mask in zip(array, masks, strict=True)] for name, array in crossed.items()}
    values[HEAD] = [
        np.concatenate(
            [
                (outputs[name][i][mask] if "sequence" in axes[name][1:2] else outputs[name][i]).ravel()
                for name in outputs
            ]
        )[None]
        for i, mask in enumerate(masks)
    ]
    return values


class _Differences:
    """Running statistics of |differences|, a sample at a time; infinite once a value was not finite."""

    def __init__(self) -> None:
        self.max = self.total = self.peaks = 0.0
        self.values = self.rows = self.unchanged = self.samples = 0

    def add(self, actual: np.ndarray, expected: np.ndarray) -> None:
        """Count one sample's values (tokens, features)."""
        with np.errstate(invalid="ignore"):
            error = np.abs(actual - expected)
        peak = float(error.max()) if np.isfinite(error).all() else np.inf
        low = UNCHANGED * np.abs(expected).max(axis=1, keepdims=True)
        self.max, self.peaks, self.total = max(self.max, peak), self.peaks + peak, self.total + float(error.sum())
        self.values, self.rows, self.samples = self.values + error.size, self.rows + len(error), self.samples + 1
        self.unchanged += int((error <= low).all(axis=1).sum())

    @property
    def mean(self) -> float:
        return self.total / self.values if self.values else 0.0

    @property
    def unchanged_share(self) -> float:
        return self.unchanged / self.rows if self.rows else 1.0

    @property
    def mean_peak(self) -> float:
        """Mean of the samples' largest."""
        return self.peaks / self.samples if self.samples else 0.0


@dataclass(frozen=True)
class _Limits:
    """The largest and the mean difference that are tolerated, and the share of rows that must be equal."""

    max: float
    mean: float
    unchanged_share: float


class _Kind:
    """Errors of the engine and the two changes of the reference, all accumulated or all isolated."""

    def __init__(self) -> None:
        self.engine, self.rounding_noise, self.one_step_shift = _Differences(), _Differences(), _Differences()

    def add(self, actual: np.ndarray, exact: np.ndarray, noisy: np.ndarray, shifted: np.ndarray) -> None:
        self.engine.add(actual, exact)
        self.rounding_noise.add(noisy, exact)
        self.one_step_shift.add(shifted, exact)

    def max_tolerance(self, low: float, *, quantized: bool) -> float:
        return MAX_FACTOR * max(self.rounding_noise.max, self.one_step_shift.max if quantized else 0.0) + low

    def limits(self, low: float, rows: int, *, quantized: bool) -> _Limits:
        """What rounding and the step of one code let `rows` of values differ by."""
        shift_max = self.one_step_shift.max if quantized else 0.0
        mean = MEAN_FACTOR * (self.rounding_noise.mean + shift_max / max(rows, 1)) + low
        same_noise = self.rounding_noise.unchanged_share
        enough = same_noise * self.rounding_noise.rows >= UNCHANGED_SAMPLES
        unchanged = same_noise / UNCHANGED_FACTOR if enough else 0.0
        return _Limits(self.max_tolerance(low, quantized=quantized), mean, unchanged)

    def error_in_steps(self, low: float, *, quantized: bool) -> float | None:
        """The engine's largest error in quantization steps as they show here; None where only rounding shows."""
        shift = self.one_step_shift
        return _number(self.engine.max / shift.mean_peak) if quantized and shift.max > low else None


class _Boundary:
    """What is gathered at one boundary, a sample at a time."""

    def __init__(self) -> None:
        self.accumulated, self.isolated = _Kind(), _Kind()
        self.top = 0.0
        self.broken = 0  # samples whose output is not finite, for a finite input
        self.unsound = 0  # samples for which the checkpoint's own output is not finite

    def judged(self, block: str, *, quantized: bool) -> BlockParity:
        """The verdict on what the boundary ends."""
        low, through, own = UNCHANGED * self.top, self.accumulated, self.isolated
        limits = own.limits(low, own.engine.rows, quantized=quantized)
        limit, mean_limit, required = limits.max, limits.mean, limits.unchanged_share
        complaints = []
        if self.unsound:
            complaints.append(f"the checkpoint itself gives NaN or infinity in {self.unsound} samples")
        if self.broken:
            complaints.append(f"NaN or infinity in {self.broken} of {own.engine.samples} samples")
        if not own.engine.max <= limit:
            complaints.append(f"its isolated error is {own.engine.max:.4g}, tolerated {limit:.4g}")
        if not own.engine.mean <= mean_limit:
            complaints.append(f"its mean isolated error is {own.engine.mean:.4g}, tolerated {mean_limit:.4g}")
        if own.engine.unchanged_share < required:
            complaints.append(f"{own.engine.unchanged_share:.1%} of the tokens equal, required {required:.1%}")
        judged = own.engine.samples > 0
        return BlockParity(
            block=block,
            accumulated_max_abs=_number(through.engine.max),
            accumulated_mean_abs=_number(through.engine.mean),
            accumulated_max_tolerance=_number(through.max_tolerance(low, quantized=quantized)),
            accumulated_steps=through.error_in_steps(low, quantized=quantized),
            isolated_max_abs=_number(own.engine.max),
            isolated_mean_abs=_number(own.engine.mean),
            isolated_steps=own.error_in_steps(low, quantized=quantized),
            isolated_max_tolerance=_number(limit),
            isolated_mean_tolerance=_number(mean_limit),
            isolated_unchanged_share=own.engine.unchanged_share,
            isolated_unchanged_required=required,
            passed=not complaints if judged else None,
            reason="; ".join(complaints)
            or ("within its tolerance" if judged else "not judged: what it read was not finite already"),
        )

    def problem_of(self, apart: _Differences, *, quantized: bool) -> str | None:
        """How two engines differ here beyond what rounding through all blocks does, None where they do not."""
        limits = self.accumulated.limits(UNCHANGED * self.top, apart.rows, quantized=quantized)
        if apart.max <= limits.max and apart.mean <= limits.mean and apart.unchanged_share >= limits.unchanged_share:
            return None
        return (
            f"their outputs differ by up to {apart.max:.4g}, tolerated {limits.max:.4g}, and by {apart.mean:.4g} in "
            f"the mean, tolerated {limits.mean:.4g}; {apart.unchanged_share:.1%} of them are equal, required "
            f"{limits.unchanged_share:.1%}"
        )


def _tally(tallies: Mapping[str, _Boundary], actual: Values, runs: Mapping[str, _ReferenceRun]) -> None:
    """Count one batch: `actual` of the engine, `runs` of the reference by its arithmetic."""
    exact, noise, shift = (runs[name] for name in ("exact", "rounding_noise", "one_step_shift"))
    before: list[np.ndarray] | None = None
    for name, tally in tallies.items():
        for i, values in enumerate(actual[name]):
            tally.accumulated.add(
                values, exact.accumulated[name][i], noise.accumulated[name][i], shift.accumulated[name][i]
            )
            if before is not None and not np.isfinite(before[i]).all():
                continue  # what the block read was not finite already
            tally.broken += not np.isfinite(values).all()
            tally.unsound += not np.isfinite(exact.isolated[name][i]).all()
            tally.top = max(tally.top, float(np.abs(exact.isolated[name][i]).max()))
            tally.isolated.add(values, exact.isolated[name][i], noise.isolated[name][i], shift.isolated[name][i])
        before = actual[name]


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
