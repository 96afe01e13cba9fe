"""The matrices of a plan as a report shows them: planned, found in the graphs, and how much the projection loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nxm_export.contract.checkpoint import Checkpoint, read_tensor
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.records.verify_report import VerifyReport, WeightReport
from nxm_export.errors import NxmError
from nxm_export.reporting.figures import Figure, RunFile
from nxm_export.reporting.run_files import Files

SAMPLE_ROWS, SAMPLE_COLUMNS = 32, 64  # of the picture of one matrix


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of the plan. `stored`, `pattern` and `zeros` are by graph, as `nxm verify` found them in the
    file, or by graph and part (``trt query``) where a graph has a fused one in `parts`; `sensitivity` is the search's
    divergence of the planned option, `projection` what the projection of the dense weights onto the plan loses: ``|W -
    P(W)|^2 / |W|^2``."""

    name: str
    block: int | None
    role: str | None
    shape: tuple[int, int]
    spec: WeightSpec
    stored: Mapping[str, str]
    pattern: Mapping[str, str | None]
    zeros: Mapping[str, Figure]
    problems: tuple[str, ...]
    sensitivity: float | None
    projection: float | None
    parts: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called in graphs and engines: by its own name, and by those of its parts."""
        return (self.name, *self.parts)


@dataclass(frozen=True)
class Sample:
    """The corner of one stored matrix: integer codes (rows, columns), or floats where the plan leaves them."""

    name: str
    values: npt.NDArray[np.float32 | np.int8]
    spec: WeightSpec


def matrices(
    root: Path,
    checkpoint: Checkpoint | None,
    verified: Mapping[str, RunFile[VerifyReport] | None],
    sensitivity: Mapping[tuple[str, str], float] | None,
) -> Iterator[Matrix]:
    """Every matrix of the plan; `verified` are the verify.json of each graph, `sensitivity` what a search measured."""
    if checkpoint is None:
        return
    places = {
        checkpoint.family.weight(block, linear): (number, linear.role)
        for number, block in enumerate(checkpoint.family.blocks(checkpoint.config))
        for linear in checkpoint.family.linears
    }
    by_name = {graph: _by_name(report) for graph, report in verified.items() if report is not None}
    for name, spec in checkpoint.plan.weights.items():
        parts = tuple(part for part in checkpoint.family.parts(name) if part != name)
        reports = {
            _where(graph, name, found): weights[found]
            for graph, weights in by_name.items()
            for found in (name, *parts)
            if found in weights and weights[found][0].planned
        }
        block, role = places.get(name, (None, None))
        yield Matrix(
            name,
            block,
            role,
            checkpoint.plan.shapes[name],
            spec,
            {graph: report.stored for graph, (report, _) in reports.items()},
            {graph: report.pattern for graph, (report, _) in reports.items()},
            {graph: zeros for graph, (_, zeros) in reports.items()},
            tuple(dict.fromkeys(problem for report, _ in reports.values() for problem in report.problems)),
            None if sensitivity is None else sensitivity.get((name, str(spec))),
            None if sensitivity else _projection(root / "dense", name, spec),
            parts,
        )


def _where(graph: str, name: str, found: str) -> str:
    """The graph, and of a matrix that it has in parts which one: ``trt query``."""
    return graph if found == name else f"{graph} {found.removesuffix('.weight').rpartition('.')[2]}"


def _by_name(verified: RunFile[VerifyReport]) -> dict[str, tuple[WeightReport, Figure]]:
    """What `nxm verify` found of every matrix, with the share of its zeros as a figure."""
    reports = {}
    for number, report in enumerate(verified.content.weights):
        zeros = verified.figure("weights", number, "zeros")
        assert zeros is not None
        reports[report.name] = (report, zeros)
    return reports


def _projection(dense: Path, name: str, spec: WeightSpec) -> float | None:
    try:
        weight = read_tensor(dense, name)
    except (NxmError, OSError):
        return None
    return projection_error(weight, spec)


def projection_error(weight: npt.NDArray[np.float32], spec: WeightSpec) -> float:
    """``|W - P(W)|^2 / |W|^2`` of a dense weight (out, in), float32: the N of every M largest kept along the input
    axis, then rounded to the nearest of ``2 * qmax + 1`` even steps up to the largest of each output channel."""
    w = weight.astype(np.float64)
    z = w
    if spec.pattern is not None and w.shape[1] % spec.pattern.m == 0:
        z = _keep_largest(w, spec.pattern)
    if spec.qmax is not None:
        scale = np.abs(z).max(axis=1, keepdims=True) / spec.qmax
        scale[scale == 0] = 1.0
        z = np.rint(z / scale) * scale
    total = float(np.square(w).sum())
    return float(np.square(w - z).sum() / total) if total else 0.0


def _keep_largest(w: npt.NDArray[np.float64], pattern: NMPattern) -> npt.NDArray[np.float64]:
    groups = w.reshape(w.shape[0], -1, pattern.m)
    order = np.argsort(-np.abs(groups), axis=-1, kind="stable")  # ties go to the lower index
    nonzero_mask = np.zeros(groups.shape, bool)
    np.put_along_axis(nonzero_mask, order[..., : pattern.n], True, axis=-1)
    return np.asarray(np.where(nonzero_mask, groups, 0.0).reshape(w.shape))


def sample(checkpoint: Checkpoint | None, files: Files) -> Sample | None:
    """The upper left corner of the first matrix that has a pattern, or else is quantized, or else any."""
    if checkpoint is None:
        return None
    weights = checkpoint.plan.weights
    ranked = sorted(weights, key=lambda name: (weights[name].pattern is None, weights[name].weight_bits is None))
    name = ranked[0]
    try:
        whole = checkpoint.codes(name) if weights[name].weight_bits else checkpoint.weight(name)
    except NxmError as error:
        files.doubts.append(str(error))
        return None
    return Sample(name, whole[:SAMPLE_ROWS, :SAMPLE_COLUMNS], weights[name])
