"""The page itself: tables of a run, the pictures, one template, one style sheet, and a policy that allows nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from nxm_export import __version__
from nxm_export.contract.plan import COUNTINGS, NMPattern
from nxm_export.errors import PlanError
from nxm_export.reporting.figures import Figure, Shown, Source, pointer
from nxm_export.reporting.matrices import Matrix
from nxm_export.reporting.parity_tables import parity_tables
from nxm_export.reporting.plots import Picture
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.tables import Cell, Code, Table, or_dash, pair
from nxm_export.reporting.verdicts import (
    COUNTED,
    compressed_value,
    compression,
    dense_value,
    main_engine,
    metric,
    ratios,
    verdicts,
)


def environment() -> jinja2.Environment:
    """Templates of this package; everything that is not marked safe is escaped, and an unknown name is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("nxm_export", "reporting"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.tests["shown"] = lambda value: isinstance(value, Shown)
    made.tests["code"] = lambda value: isinstance(value, Code)
    made.tests["several"] = lambda value: isinstance(value, tuple)
    return made


def render(run: Run, pictures: Mapping[str, Picture]) -> str:
    """The HTML of a run. The same run gives the same bytes."""
    style = files("nxm_export.reporting").joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # The drawings are this package's own output, in which matplotlib and ElementTree have escaped what users wrote.
    drawn = {key: Markup(picture.svg) for key, picture in pictures.items()}
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            style=Markup(style),
            policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
            verdicts=verdicts(run),
            pictures=pictures,
            drawn=drawn,
            subject=_subject(run),
            counts=_counts(run),
            labels=_labels(run),
            version=__version__,
            tables={
                "accuracy": _accuracy(run),
                "compression": _compression(run),
                "files": _sizes(run),
                "latency": _latency(run),
                "training": _training(run),
                "matrices": _matrices(run),
                "stages": _stages(run),
                "versions": _versions(run),
                "engines": _engines(run),
                "reasons": _reasons(run),
                "hashes": Table(
                    "Files that this page was made from",
                    ("file", "sha256"),
                    [(Code(file), Code(digest)) for file, digest in sorted(run.files.items())],
                ),
            },
            parity=[table for table in parity_tables(run) if table.rows],
            reasons=dict.fromkeys(
                str(engine.parity.data["reason"])
                for engine in run.engines
                if engine.parity and engine.parity.data.get("reason")
            ),
            bench_notes=list(_bench_notes(run)),
        )
    )


def _subject(run: Run) -> str:
    kind = run.config.get("model_type")
    task = run.spec.data.get("task") if run.spec else None
    return ", ".join(str(part) for part in (kind, task) if part)


def _counts(run: Run) -> list[tuple[str, Shown]]:
    """Options of the plan and how many matrices have each."""
    counts = run.plan.pattern_counts if run.plan else {}
    return [
        (name, (run.figure("plan", name) or Figure(count, "checkpoint/nxm_plan.json")).shown("general"))
        for name, count in counts.items()
    ]


def _labels(run: Run) -> list[str]:
    labels = run.spec.data.get("labels") if run.spec else None
    return [str(label) for label in labels] if isinstance(labels, list) else []


def _accuracy(run: Run) -> Table:
    rows: list[tuple[Cell, ...]] = []
    engine = main_engine(run)
    parity = engine.parity if engine else None

    def between(source: Source | None, key: str = "interval") -> Cell:
        return pair(source.at(key, 0), source.at(key, 1), "score") if source else "-"

    if dense := dense_value(run):
        rows.append(("dense, FP32", dense.shown("score"), between(run.dense), ""))
    if run.compressed and (value := run.figure("checkpoint") or run.compressed.at("value")):
        counts = ", ".join(f"{count} x {name}" for name, count in (run.plan.pattern_counts if run.plan else {}).items())
        if run.plan and run.plan.embedding == "int8":
            counts += ", INT8 embedding table"
        rows.append(("compressed, PyTorch", value.shown("score"), between(run.compressed), counts))
    low, high = run.figure("difference_interval", 0), run.figure("difference_interval", 1)
    if parity and (value := compressed_value(run)):
        note: Cell = (
            ("difference to dense: ", low.shown("signed"), " to ", high.shown("signed"), " (95 %, paired)")
            if low and high
            else ""
        )
        rows.append(
            (
                f"compressed, engine {engine.name if engine else ''}",
                value.shown("score"),
                between(parity, "engine_interval"),
                note,
            )
        )
    samples = run.figure("dev_samples") or (run.dense.at("dev_samples") if run.dense else None)
    on = f" on {samples.value} held-out samples" if samples else ""
    return Table(f"{metric(run)}{on}", ("model", f"#{metric(run)}", "#95 % interval", "note"), rows)


def _compression(run: Run) -> Table:
    rows = [
        (counting, figure.shown("share"), COUNTED[counting])
        for counting in COUNTINGS
        if (figure := compression(run, counting))
    ]
    return Table(
        "Compression of the encoder's matrices, against FP32", ("counting", "#compression", "what is counted"), rows
    )


def _sizes(run: Run) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for graph in run.graphs:
        if size := run.figure("onnx_bytes", graph.name) or graph.bytes:
            rows.append((Code(f"onnx/{graph.name}"), "graph", size.shown("megabytes")))
    for engine in run.engines:
        if engine.bytes:
            rows.append((Code(f"engines/{engine.name}"), "engine", engine.bytes.shown("megabytes")))
    if run.plan:
        for label, sparse in (("dense kernels", False), ("2:4 kernels", True)):
            size = Figure(run.plan.engine_bytes(sparse=sparse), "checkpoint/nxm_plan.json")
            rows.append(
                (f"planned matrices in an INT8 engine, {label}", "computed from the plan", size.shown("megabytes"))
            )
    return Table("Bytes of files and engines", ("what", "kind", "#MB"), rows)


def _latency(run: Run) -> Table:
    speed = {(row["name"].value, row["batch"].value, row["sequence"].value): row for row in ratios(run)}
    rows: list[tuple[Cell, ...]] = []
    for bench in run.benches:
        timings = bench.data.get("timings")
        for number, row in enumerate(timings if isinstance(timings, list) else []):
            name, batch, sequence = (row.get(key) for key in ("name", "batch", "sequence"))
            median = run.figure("latency_ms", f"{name} {batch}x{sequence}", "median") or bench.at(
                "timings", number, "median"
            )
            ratio = speed.get((name, batch, sequence))
            note: Cell = "reference"
            if ratio:
                note = (
                    ratio["speedup"].shown("ratio"),
                    "x (",
                    ratio["low"].shown("ratio"),
                    " to ",
                    ratio["high"].shown("ratio"),
                    ")",
                )
            low, high = (bench.at("timings", number, "quartiles", side) for side in (0, 1))
            rows.append(
                (
                    Code(str(name)),
                    f"{batch}x{sequence}",
                    or_dash(median, "milliseconds"),
                    pair(low, high, "milliseconds"),
                    note,
                )
            )
    return Table(
        "Latency, engines interleaved",
        ("engine", "batch x tokens", "#median ms", "#middle half, ms", "#speed against the first (95 %)"),
        rows,
    )


def _bench_notes(run: Run) -> Iterator[str]:
    for bench in run.benches:
        if bench.data.get("verdict"):
            yield f"Verdict: {bench.data['verdict']}"
        for missing in bench.data.get("unmeasured") or []:
            yield f"Not measured: {missing}"


def _training(run: Run) -> Table:
    keys = ("recipe", "admm", "admm_steps", "qat_steps", "steps", "train_samples", "held_out_samples", "residual", "residual_gate_passed", "mask_hash")  # fmt: skip
    rows = [
        (key.replace("_", " "), figure.shown("general"))
        for key in keys
        if (figure := run.figure("training", key) or (run.compressed.at(key) if run.compressed else None))
    ]
    return Table("Compression training", ("what", "value"), rows)


def _matrices(run: Run) -> Table:
    trt = [engine for engine in run.engines if engine.is_trt and engine.truth]
    truth = {engine.name: {row["name"]: row for row in engine.truth} for engine in trt}
    measured = any(matrix.sensitivity is not None for matrix in run.matrices)
    columns = ("matrix", "#out x in", "planned", "stored as", "N:M found", "#zeros", "2:4 along K", "#sensitivity" if measured else "#projection error")  # fmt: skip
    rows = []
    for matrix in run.matrices:
        error = matrix.sensitivity if measured else matrix.projection
        zeros = next(iter(matrix.zeros.values()), None)
        rows.append(
            (
                Code(matrix.name.removesuffix(".weight")),
                f"{matrix.shape[0]}x{matrix.shape[1]}",
                str(matrix.spec),
                _agreed(matrix.stored),
                _agreed({graph: pattern or "dense" for graph, pattern in matrix.pattern.items()}),
                or_dash(zeros, "share"),
                _sparse_along_k(matrix),
                "-" if error is None else f"{error:.2g}" if measured else f"{error:.2%}",
                *(_kernel(truth[engine.name].get(matrix.name)) for engine in trt),
                "; ".join(matrix.problems) or "none",
            )
        )
    return Table(
        "Every matrix: planned, and found on the stored numbers of the graphs",
        (*columns, *(f"kernel, {engine.name}" for engine in trt), "problems"),
        rows,
    )


def _agreed(by_graph: Mapping[str, str]) -> str:
    values = list(dict.fromkeys(by_graph.values()))
    if len(values) <= 1:
        return values[0] if values else "not exported"
    return ", ".join(f"{graph} {value}" for graph, value in by_graph.items())


def _sparse_along_k(matrix: Matrix) -> str:
    if not matrix.pattern:
        return "unknown"
    try:
        found = [pattern is not None and NMPattern.parse(pattern).implies_2_4 for pattern in matrix.pattern.values()]
    except PlanError:
        return "unknown"
    return "yes" if all(found) else "no"


def _kernel(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "unknown"
    kernel, reason = str(row.get("kernel") or "").split("_tilesize")[0], row.get("reason")
    if row.get("chosen") is True:
        return f"sparse: {kernel}" if kernel else "sparse"
    word = "unknown" if row.get("chosen") is None else f"dense: {kernel}" if kernel else "dense"
    return f"{word} ({reason})" if reason else word


def _reasons(run: Run) -> Table:
    """What the reasons in the kernel columns mean."""
    from engines.sparsity.report import REASONS

    planned = {matrix.name for matrix in run.matrices}
    rows_of = [row for engine in run.engines for row in engine.truth if row.get("name") in planned]
    used = {str(row["reason"]) for row in rows_of if row.get("reason")}
    rows = [(Code(reason), REASONS.get(reason, "")) for reason in sorted(used)]
    return Table("Why a matrix is not known to run sparse", ("reason", "means"), rows)


def _stages(run: Run) -> Table:
    rows = []
    for name, record in run.stages.items():
        hashes = [f"{label} {digest}" for label, digest in record.inputs.items()]
        rows.append(
            (
                Code(name),
                Shown(Figure(record.seconds, "manifest.json", pointer("stages", name, "seconds")), "general"),
                "-" if record.seed is None else str(record.seed),
                Code(shlex.join(record.command)),
                Code(", ".join(hashes) or "none"),
            )
        )
    return Table("Stages of the run", ("stage", "#seconds", "#seed", "command", "inputs, sha256"), rows)


def _versions(run: Run) -> Table:
    found: dict[str, dict[str, list[str]]] = {}
    for stage, record in run.stages.items():
        for package, version in record.versions.items():
            found.setdefault(package, {}).setdefault(version, []).append(stage)
    rows = [
        (
            Code(package),
            versions.popitem()[0]
            if len(versions) == 1
            else "; ".join(f"{v} in {', '.join(s)}" for v, s in versions.items()),
        )
        for package, versions in found.items()
    ]
    return Table("Versions", ("package", "version"), rows)


def _engines(run: Run) -> Table:
    rows = []
    for engine in run.engines:
        if engine.passport is None:
            continue
        data = engine.passport.data
        graph, device = (data.get(key) if isinstance(data.get(key), dict) else {} for key in ("graph", "device"))
        rows.append(
            (
                Code(engine.name),
                f"{data.get('backend')}, {graph.get('dtype', 'unknown')}, {graph.get('placement', 'unknown')}",
                str(device.get("gpu") or device.get("name") or device.get("kind") or "unknown"),
                str(data.get("created", "unknown")),
                Code(str(data.get("engine_sha256"))),
                Code(str(data.get("onnx_sha256"))),
                Code(json.dumps(data.get("options"), default=str)),
            )
        )
    return Table("Engines, from their passports", ("engine", "backend, dtype, placement", "built on", "created", "engine sha256", "ONNX sha256", "options"), rows)  # fmt: skip
