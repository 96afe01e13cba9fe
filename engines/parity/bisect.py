"""Which encoder block does an engine compute wrongly? Compared with PyTorch at block boundaries, each block by itself.

Errors travel: behind a wrong block all others look wrong, and behind many right ones rounding has moved many codes. So every
block of the reference is also given what the *engine's* block read, and the two results are compared: what differs then is
the block's *own* error, whatever came before. It is judged as outputs are (`engines.parity.tolerance`), against the same two
changes of the reference, measured in that block alone; here a token is a sample. A block by itself rounds little, so that
mistakes show that no output would, in half precision too. The error as it has travelled is given beside it.

The first block that fails is where the two part. The head (all behind the last block) and what the first block reads are
treated alike. ``bisect.json`` beside the engine has the result and names the engine's sha256.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import backend
from engines.parity.block_outputs import Places, cut_ort, cut_tensorrt
from engines.parity.compare import open_part
from engines.parity.compatibility import require_outputs
from engines.parity.tolerance import MAX_FACTOR, MEAN_FACTOR, QUIET, QUIET_FACTOR, QUIET_SAMPLES
from engines.reference import pytorch
from engines.reference.pytorch import EMBEDDINGS, Perturbation
from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.families import FAMILIES
from nxm_export.data.examples import Features, pad, sorted_batches
from nxm_export.errors import DataError, ParityError
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.json_files import json_text

SCHEMA = "nxm-bisect/1"
BISECT_FILE = "bisect.json"
HEAD = "head"
SAMPLES = 32
BATCH = 8


@dataclass(frozen=True)
class BlockParity:
    """What an engine has behind one block, against PyTorch, over all real tokens.

    `max_abs`, `mean_abs`, `steps` and `max_tolerance` are of the error as it has travelled so far; the ``own_`` ones are of
    this block given the engine's own input, and decide. Steps are in the unit of `engines.parity.tolerance.OutputParity`, at this
    place, and None where no quantizer acts. `passed` is None for a block whose input was not finite already.
    """

    block: str
    max_abs: float
    mean_abs: float
    max_tolerance: float
    steps: float | None
    own_max_abs: float
    own_mean_abs: float
    own_steps: float | None
    own_max_tolerance: float
    own_mean_tolerance: float
    own_quiet: float
    own_quiet_required: float
    passed: bool | None
    reason: str


@dataclass(frozen=True)
class BisectReport:
    """All blocks of an engine, in the order in which they run; `first_diverging` is the first that failed.

    `kernels` are the operators of which the cut engine runs another number than the engine itself ([engine, cut]), None
    where that cannot be told; `outputs_equal` says whether both give the same outputs, bit for bit. Where either differs, the
    cut engine is not quite the engine.
    """

    engine: str
    engine_sha256: str
    backend: str
    samples: int
    tokens: int
    first_diverging: str | None
    kernels_changed: bool | None
    kernels: Mapping[str, Sequence[int]] | None
    outputs_equal: bool
    blocks: list[BlockParity]
    reason: str

    @property
    def passed(self) -> bool:
        """True when no block parts."""
        return self.first_diverging is None

    def require(self) -> None:
        """Raise `ParityError` unless `passed`."""
        for block in self.blocks:
            if block.block == self.first_diverging:
                raise ParityError(f"{self.engine}: it parts from the checkpoint in {block.block}: {block.reason}")

    def to_dict(self) -> dict[str, Any]:
        """The form of ``bisect.json`` and ``--json``."""
        return {"schema": SCHEMA, "passed": self.passed, **asdict(self)}


def bisect(
    checkpoint: str | Path, engine: str | Path, features: Sequence[Features], *, graph: Path | None = None
) -> BisectReport:
    """Compare a checkpoint and an engine directory block by block, on at most `SAMPLES` samples; writes ``bisect.json``.

    `graph` is the ONNX file that an engine of another backend than ort was built from: it is built again with the boundaries as outputs. Raises
    `EngineUnavailable` where that cannot be done here, `ArtifactError` for an engine of another checkpoint.
    """
    if not features:
        raise DataError("no samples to compare on")
    checkpoint = Path(checkpoint)
    part = open_part(checkpoint, Path(engine))
    family, config = FAMILIES[part.spec.model_type], read_config(checkpoint)
    cuts = Places.of(family, config)
    picks = np.linspace(0, len(features) - 1, min(SAMPLES, len(features))).astype(int)
    samples = [features[i] for i in picks]
    kernels: dict[str, list[int]] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        if part.passport.backend == "ort":
            cut, names, kernels = cut_ort(part.directory, part.passport, cuts, Path(scratch))
        else:
            if graph is None:
                raise DataError(f"{part.directory}: bisecting this engine needs the graph that it was built from")
            cut, names = cut_tensorrt(part.directory, part.passport, cuts, graph, Path(scratch))
        places = [EMBEDDINGS, *cuts.names, HEAD]
        tallies = {place: _Place() for place in places}
        equal, load, options = True, pytorch.load, {**part.reference}
        with (
            cut as ours,
            backend(part.passport.backend).load(part.directory) as whole,
            load(checkpoint, **options, exact=True) as exact,
            load(checkpoint, **options, perturbation=Perturbation(part.jitter, everywhere=True)) as noisy,
            load(checkpoint, **options, perturbation=Perturbation(one_step_shift=True)) as nudged,
        ):
            require_outputs(part.directory, part.spec, whole.outputs, "the engine file")
            require_outputs(part.directory, part.spec, exact.outputs, str(checkpoint))
            for indices in sorted_batches(samples, BATCH):
                feeds = pad([samples[i] for i in indices], part.spec.pad_id)
                found = ours.run(feeds)
                equal &= all(np.array_equal(found[name], array) for name, array in whole.run(feeds).items())
                given = {place: found[name] for place, name in names.items()}
                outputs = {name: found[name] for name in part.spec.outputs}
                runs = {
                    (kind, own): _joined(reference.run_blocks(feeds, given if own else None), part.spec.outputs, feeds)
                    for kind, reference in (("exact", exact), ("noise", noisy), ("step", nudged))
                    for own in (False, True)
                }
                _tally(tallies, _joined((outputs, given), part.spec.outputs, feeds), runs)
    rows = [_judge(place, tallies[place], quantized=bool(part.plan)) for place in places]
    first = next((row.block for row in rows if row.passed is False), None)
    report = BisectReport(
        engine=str(part.directory),
        engine_sha256=part.passport.engine_sha256,
        backend=part.passport.backend,
        samples=len(samples),
        tokens=sum(len(sample["input_ids"]) for sample in samples),
        first_diverging=first,
        kernels_changed=None if kernels is None else bool(kernels),
        kernels=kernels,
        outputs_equal=bool(equal),
        blocks=rows,
        reason=(
            f"a block's own error: max within {MAX_FACTOR:g} x what the block changes by when one code of each of its quantized tensors moves by "
            f"one step, or by rounding in {part.dtype}; mean within {MEAN_FACTOR:g} x that rounding; tokens equal: a {1 / QUIET_FACTOR:.0%} share of "
            "those that the rounding leaves equal"
        ),
    )
    write_atomic(part.directory / BISECT_FILE, json_text(report.to_dict()))
    return report


Values = dict[str, list[np.ndarray]]  # place -> (tokens, features) of every sample of a batch


def _joined(
    run: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    axes: Mapping[str, Sequence[str]],
    feeds: Mapping[str, np.ndarray],
) -> Values:
    """Real tokens of every sample at every place; all outputs together are the head, one row of values per sample."""
    outputs, boundaries = run
    masks = feeds["attention_mask"].astype(bool)
    values = {place: [row[mask] for row, mask in zip(array, masks, strict=True)] for place, array in boundaries.items()}
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


class _Sum:
    """Running statistics of |differences|, a sample at a time."""

    def __init__(self) -> None:
        self.max = self.total = self.peaks = 0.0
        self.values = self.rows = self.quiet = self.samples = 0

    def add(self, ours: np.ndarray, wanted: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):
            error = np.abs(ours - wanted)
        peak = float(error.max()) if np.isfinite(error).all() else np.inf
        low = QUIET * np.abs(wanted).max(axis=1, keepdims=True)
        self.max, self.peaks, self.total = max(self.max, peak), self.peaks + peak, self.total + float(error.sum())
        self.values, self.rows, self.samples = self.values + error.size, self.rows + len(error), self.samples + 1
        self.quiet += int((error <= low).all(axis=1).sum())

    @property
    def mean(self) -> float:
        return self.total / self.values if self.values else 0.0

    @property
    def share(self) -> float:
        return self.quiet / self.rows if self.rows else 1.0


class _Place:
    """What is gathered at one boundary: errors of the engine and changes of the reference, travelled and own."""

    def __init__(self) -> None:
        self.sums = {(kind, own): _Sum() for kind in ("engine", "noise", "step") for own in (False, True)}
        self.top = 0.0
        self.poisoned = self.broken = 0  # samples whose input was not finite; whose output is not, for a finite input


def _tally(tallies: Mapping[str, _Place], found: Values, runs: Mapping[tuple[str, bool], Values]) -> None:
    before: list[np.ndarray] | None = None
    for place, tally in tallies.items():
        for i, ours in enumerate(found[place]):
            exact = {own: runs["exact", own][place][i] for own in (False, True)}
            tally.sums["engine", False].add(ours, exact[False])
            for kind in ("noise", "step"):
                tally.sums[kind, False].add(runs[kind, False][place][i], exact[False])
            if before is not None and not np.isfinite(before[i]).all():
                tally.poisoned += 1
                continue
            tally.broken += not np.isfinite(ours).all()
            tally.top = max(tally.top, float(np.abs(exact[True]).max()))
            tally.sums["engine", True].add(ours, exact[True])
            for kind in ("noise", "step"):
                tally.sums[kind, True].add(runs[kind, True][place][i], exact[True])
        before = found[place]


def _judge(place: str, tally: _Place, *, quantized: bool) -> BlockParity:
    own, noise, step = (tally.sums[kind, True] for kind in ("engine", "noise", "step"))
    through = {kind: tally.sums[kind, False] for kind in ("engine", "noise", "step")}
    low = QUIET * tally.top
    step_max = step.max if quantized else 0.0
    limit = MAX_FACTOR * max(noise.max, step_max) + low
    mean_limit = MEAN_FACTOR * (noise.mean + step_max / max(own.rows, 1)) + low
    required = noise.share / QUIET_FACTOR if noise.share * noise.rows >= QUIET_SAMPLES else 0.0
    complaints = []
    if tally.broken:
        complaints.append(f"NaN or infinity in {tally.broken} of {own.samples} samples")
    if not own.max <= limit:
        complaints.append(f"its own error is {own.max:.4g}, tolerated {limit:.4g}")
    if not own.mean <= mean_limit:
        complaints.append(f"its own mean error is {own.mean:.4g}, tolerated {mean_limit:.4g}")
    if own.share < required:
        complaints.append(f"{own.share:.1%} of the tokens equal, required {required:.1%}")
    judged = own.samples > 0
    travelled_unit, own_unit = (
        sums.peaks / sums.samples if quantized and sums.samples and sums.max > low else None  # else rounding, no step
        for sums in (through["step"], step)
    )
    return BlockParity(
        block=place,
        max_abs=through["engine"].max,
        mean_abs=through["engine"].mean,
        max_tolerance=MAX_FACTOR * max(through["noise"].max, through["step"].max if quantized else 0.0) + low,
        steps=through["engine"].max / travelled_unit if travelled_unit else None,
        own_max_abs=own.max,
        own_mean_abs=own.mean,
        own_steps=own.max / own_unit if own_unit else None,
        own_max_tolerance=limit,
        own_mean_tolerance=mean_limit,
        own_quiet=own.share,
        own_quiet_required=required,
        passed=not complaints if judged else None,
        reason="; ".join(complaints)
        or ("within its tolerance" if judged else "not judged: what it read was not finite already"),
    )
