"""Engine directories are compared with their checkpoint on a data file, as a whole or block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nxm_export.contract.choices import (
    LOWERING,
    WEIGHT_STORAGE,
)
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.columns import Columns
from nxm_export.errors import ArtifactError
from nxm_export.pipeline.labelled_texts import shared_features

if TYPE_CHECKING:
    from engines.parity.bisect_reports import BisectReport
    from engines.parity.reports import Comparison


def compare_engines(
    checkpoint: str | Path,
    engines: Sequence[str | Path],
    data: str,
    columns: Columns = Columns(),
    gates: Sequence[str] = (),
) -> Comparison:
    """Compare engine directories with the checkpoint and with each other on one labelled data file: a report of each,
    and the reason where one cannot run here.

    `gates` are such as ``drop<=0.5`` (see `engines.parity.gates`).
    """
    from engines.parity.compare import compare_all
    from engines.parity.gates import parse_gate

    parsed = [parse_gate(gate) for gate in gates]
    features, numbered = shared_features(engines, data, columns)
    return compare_all(checkpoint, engines, features, gates=parsed, numbered=numbered)


def bisect_engines(
    checkpoint: str | Path, engines: Sequence[str | Path], data: str, columns: Columns = Columns()
) -> list[BisectReport]:
    """Find the first block where each engine parts from the checkpoint in PyTorch; a report each.

    Engines are built again with the blocks' outputs as graph outputs; those of TensorRT from a new export of the
    checkpoint.
    """
    from engines.base import backend
    from engines.parity.bisect import bisect
    from engines.passport import load_passport

    (features, _), reports = shared_features(engines, data, columns), []
    for engine in map(Path, engines):
        passport = load_passport(engine)
        if backend(passport.backend).CAPABILITIES.runs_onnx:
            reports.append(bisect(checkpoint, engine, features, graph=engine / passport.engine))
            continue
        with TemporaryDirectory() as scratch:
            graph = _export_again(Path(checkpoint), engine, Path(scratch) / "graph")
            reports.append(bisect(checkpoint, engine, features, graph=graph))
    return reports


def _export_again(checkpoint: Path, engine: Path, out: Path) -> Path:
    """The graph that an engine was built from, made again; raises `ArtifactError` if it becomes another."""
    from engines.passport import load_passport
    from nxm_export.graph.exporter import export
    from nxm_export.graph.external_data import graph_files
    from nxm_export.graph.reading.graph_weights import load_graph

    passport, spec = load_passport(engine), load_spec(engine)
    facts = passport.graph
    dtype = facts.get("dtype")
    overrides = facts.get("precision_overrides", facts.get("islands"))  # "islands" in graphs of nxm-onnx/1
    made = export(
        checkpoint,
        out,
        target=facts.get("target", "trt"),
        task=spec.task,
        dtype=dtype,
        placement=facts.get("placement") if passport.plan else None,
        lowering=facts.get("lowering", LOWERING) if passport.plan else LOWERING,
        precision_overrides=None if overrides == dtype else overrides,
        max_length=spec.max_length,
        weights_stored=facts.get("weights_stored", WEIGHT_STORAGE),
    ).path
    if graph_files(load_graph(made), made).sha256 != passport.onnx_sha256:
        raise ArtifactError(
            f"{engine}: a new export of {checkpoint} is not the graph that it was built from (another version of a "
            "library, or other weights), so its blocks cannot be compared; build the engine from a new export and "
            "bisect that"
        )
    return made
