"""The matrices of a plan as a report shows them: planned, found in the graphs, and how much the projection loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nxm_export.contract.checkpoint import Checkpoint, read_tensor
from nxm_export.contract.families import ROLES
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.errors import NxmError
from nxm_export.reporting.figures import Figure, Source, pointer
from nxm_export.reporting.run_files import Files

SAMPLE_ROWS, SAMPLE_COLUMNS = 32, 64  # of the picture of one matrix


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of the plan. `stored`, `pattern` and `zeros` are by graph, as `nxm verify` found them in the file;
    `sensitivity` is the search's divergence of the planned option, `projection` what the projection of the dense weights
    onto the plan loses: ``|W - P(W)|^2 / |W|^2``."""

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


@dataclass(frozen=True)
class Sample:
    """The corner of one stored matrix: integer codes (rows, columns), or floats where the plan leaves them."""

    name: str
    values: np.ndarray
    spec: WeightSpec


def matrices(
    root: Path,
    checkpoint: Checkpoint | None,
    verified: Mapping[str, Source | None],
    sensitivity: Mapping[tuple[str, str], float] | None,
) -> Iterator[Matrix]:
    """Every matrix of the plan; `verified` are the verify.json of each graph, `sensitivity` the search's table, if any."""
    if checkpoint is None:
        return
    places = {
        f"{checkpoint.family.linear(block, role)}.weight": (number, role)
        for number, block in enumerate(checkpoint.family.blocks(checkpoint.config))
        for role in ROLES
    }
    rows_of = {graph: _rows_of(source) for graph, source in verified.items()}
    for name, spec in checkpoint.plan.weights.items():
        found = {graph: rows[name] for graph, rows in rows_of.items() if name in rows and rows[name].get("planned")}
        block, role = places.get(name, (None, None))
        yield Matrix(
            name,
            block,
            role,
            checkpoint.plan.shapes[name],
            spec,
            {graph: str(row.get("stored")) for graph, row in found.items()},
            {graph: row.get("pattern") for graph, row in found.items()},
            {
                graph: Figure(row["zeros"], *row["place"])
                for graph, row in found.items()
                if isinstance(row.get("zeros"), float)
            },
            tuple(dict.fromkeys(str(problem) for row in found.values() for problem in row.get("problems", []))),
            None if sensitivity is None else sensitivity.get((name, str(spec))),
            None if sensitivity else _projection(root / "dense", name, spec),
        )


def _rows_of(verify: Source | None) -> dict[str, Mapping[str, Any]]:
    """The rows of a verify.json by matrix, each with the ``place`` of its zeros."""
    rows = verify.data.get("weights") if verify else None
    if verify is None or not isinstance(rows, list):
        return {}
    return {
        str(row.get("name")): {**row, "place": (verify.file, pointer("weights", number, "zeros"))}
        for number, row in enumerate(rows)
        if isinstance(row, dict)
    }


def _projection(dense: Path, name: str, spec: WeightSpec) -> float | None:
    try:
        weight = read_tensor(dense, name)
    except (NxmError, OSError):
        return None
    return projection_error(weight, spec)


def projection_error(weight: np.ndarray, spec: WeightSpec) -> float:
    """``|W - P(W)|^2 / |W|^2`` of a dense weight (out, in), float32: the N of every M largest kept along the input axis,
    then rounded to the nearest of ``2 * qmax + 1`` even steps up to the largest of each output channel."""
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


def _keep_largest(w: np.ndarray, pattern: NMPattern) -> np.ndarray:
    groups = w.reshape(w.shape[0], -1, pattern.m)
    order = np.argsort(-np.abs(groups), axis=-1, kind="stable")  # ties go to the lower index
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, order[..., : pattern.n], True, axis=-1)
    return np.asarray(np.where(kept, groups, 0.0).reshape(w.shape))


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
