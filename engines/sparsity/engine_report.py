"""What an engine directory proves: the files beside the engine, read for `engines.sparsity.judgement`, and written for
it when the engine is built.

``weights.json`` has what the graph offers; what the build and the engine say lies in the files of
`engines.sparsity.build_evidence`. All are held against the passport before anything is judged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engines.passport import EnginePassport, load_passport
from engines.sparsity.build_evidence import Evidence, ambiguous_names, read_evidence
from engines.sparsity.judgement import ProductNames, judge
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget
from nxm_export.contract.records.matrix_facts import MatrixFacts, UnreadProduct
from nxm_export.errors import ArtifactError, EngineError
from nxm_export.storage.json_files import decode, encode

if TYPE_CHECKING:
    import onnx_ir as ir

FACTS_SCHEMA = "nxm-weights/1"
FACTS_FILE = "weights.json"


@dataclass(frozen=True)
class WeightFacts:
    """The file ``weights.json``: what the graph offers of every matrix, and what it was built for."""

    backend: str
    version: str
    compute_capability: str
    has_gpu: bool
    sparse_flag: bool
    facts: tuple[MatrixFacts, ...]
    unread: tuple[UnreadProduct, ...] = ()
    names: ProductNames = ProductNames()

    @property
    def target(self) -> SparsityTarget:
        """What it was built for."""
        return SparsityTarget(self.backend, self.version, self.compute_capability, self.sparse_flag, self.has_gpu)


def write_weight_facts(out: Path, model: ir.Model, target: SparsityTarget) -> None:
    """Write ``weights.json``: what the graph offers, and what it was built for."""
    from nxm_export.graph.reading.sparsity_scan import node_names, product_names, scan_products

    scanned, products = scan_products(model, str(out)), product_names(model)
    ambiguous = ambiguous_names(node_names(model))
    record = WeightFacts(
        backend=target.backend,
        version=target.version,
        compute_capability=target.compute_capability,
        has_gpu=target.has_gpu,
        sparse_flag=target.sparse_flag,
        facts=scanned.facts,
        unread=scanned.unread,
        names=ProductNames(products, {name: ambiguous[name] for name in products if name in ambiguous}),
    )
    (out / FACTS_FILE).write_text(encode(record, FACTS_SCHEMA), encoding="utf-8")


def read_sparsity_report(
    directory: Path, twin: Path | None = None, running: Iterable[str] | None = None
) -> SparsityReport:
    """Judge an engine directory by all that lies in it; `twin` is the dense engine's, `running` kernel names of a
    profile.

    Raises `ArtifactError` when a file is not the one of the passport, and when the directory has no ``weights.json``,
    or one that is damaged; `EngineError` for a `twin` that is none (see `twin_problem`), or was timed at another shape.
    """
    passport = load_passport(directory)
    passport.require_whole(directory)  # what lies beside an engine file proves something of that one alone
    record = read_weight_facts(directory, passport)
    evidence = read_evidence(directory, running)
    dense = None if twin is None else _twin_evidence(directory, passport, evidence, twin)
    report = judge(record.facts, evidence, record.target, dense, names=record.names)
    return replace(report, unread=record.unread)


def _twin_evidence(directory: Path, passport: EnginePassport, evidence: Evidence, twin: Path) -> Evidence:
    """The evidence of the dense twin of an engine, timed as `evidence` was."""
    other = load_passport(twin)
    other.require_whole(twin)
    if (problem := twin_problem(other, passport)) is not None:
        raise EngineError(
            f"{twin} is no dense twin of {directory}: {problem}, so their times say nothing about 2:4; "
            "`nxm build --twins` builds both"
        )
    dense = read_evidence(twin)
    if evidence.shape is not None and dense.shape is not None and evidence.shape != dense.shape:
        mine, theirs = ("x".join(map(str, shape)) for shape in (evidence.shape, dense.shape))
        raise EngineError(
            f"{directory} was measured at {mine} (batch x sequence), and {twin} at {theirs}; build both with the same "
            "--profile, and run `nxm inspect --measure` on each"
        )
    return dense


def twin_problem(dense: EnginePassport, sparse: EnginePassport) -> str | None:
    """In what `dense` differs from the dense twin of the engine `sparse`, None where in nothing: a twin is built from
    the same graph, for the same machine and shapes, with the same options but for sparse kernels."""
    if dense.sparse != "never":
        return "it was built with sparse kernels"
    for what in ("backend", "onnx_sha256", "requires", "profiles"):
        ours, theirs = getattr(sparse, what), getattr(dense, what)
        if ours != theirs:
            name = {"onnx_sha256": "graph", "requires": "machine"}.get(what, what)
            return f"its {name} is {theirs}, and not {ours}"
    for key in ("level", "workspace_bytes", "build_route", "fuse"):
        if dense.options.get(key) != sparse.options.get(key):
            return f"it was built with {key} {dense.options.get(key)}, and not {sparse.options.get(key)}"
    return None


def read_weight_facts(directory: Path, passport: EnginePassport) -> WeightFacts:
    """``weights.json`` of an engine directory; `ArtifactError` where it is missing, damaged, or not the one of its
    passport."""
    file = directory / FACTS_FILE
    text = passport.read_evidence(directory, FACTS_FILE)
    if text is None:
        raise ArtifactError(
            f"{file} is missing: this engine was built by an older version, or elsewhere; build it again"
        )
    former = {"nxm-truth/1": lambda fields: fields}  # the same fields under another name
    way_out = "build the engine again"
    return decode(text, WeightFacts, schema=FACTS_SCHEMA, source=str(file), way_out=way_out, older=former)
