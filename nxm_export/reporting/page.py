"""The page itself: tables of a run, the pictures, one template, one style sheet, and a policy that allows nothing
else."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.resources import files

import jinja2
from markupsafe import Markup

from nxm_export import __version__
from nxm_export.contract.plan import COUNTINGS
from nxm_export.contract.records.run_summary import TrainingFacts
from nxm_export.reporting.conclusion import conclude
from nxm_export.reporting.drawing import Picture
from nxm_export.reporting.figures import Figure, RunFile, Shown, pointer
from nxm_export.reporting.matrix_tables import matrix_tables
from nxm_export.reporting.parity_tables import parity_tables
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.tables import Cell, Code, PageTable, or_dash, pair
from nxm_export.reporting.verdicts import (
    COUNTED,
    compressed_value,
    compression,
    dense_value,
    dev_samples,
    main_engine,
    metric,
    ratios,
    verdicts,
)
from nxm_export.storage.run_dir import MANIFEST
from nxm_export.storage.versions import installed_versions

_TRAINING_KEYS = (
    "recipe", "admm", "admm_steps", "qat_steps", "steps", "train_samples", "held_out_samples", "residual",
    "residual_gate_passed", "mask_hash",
)  # fmt: skip


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
            policy="default-src 'none'; "
            f"style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
            conclusion=conclude(run),
            verdicts=verdicts(run),
            pictures=pictures,
            drawn=drawn,
            subject=_subject(run),
            counts=_counts(run),
            labels=run.spec.labels if run.spec else (),
            version=__version__,
            tables={
                "accuracy": _accuracy(run),
                "compression": _compression(run),
                "files": _sizes(run),
                "latency": _latency(run),
                "training": _training(run),
                "stages": _stages(run),
                "versions": _versions(run),
                "engines": _engines(run),
                "hashes": PageTable(
                    "Files that this page was made from",
                    ("file", "sha256"),
                    [(Code(file), Code(digest)) for file, digest in sorted(run.files.items())],
                    folded=f"Files that this page was made from ({len(run.files)})",
                ),
            },
            matrices=[table for table in matrix_tables(run) if table.rows],
            parity=[table for table in parity_tables(run) if table.rows],
            reasons=dict.fromkeys(
                report.content.reason
                for engine in run.engines
                for _, report in engine.comparisons
                if report.content.reason
            ),
            bench_notes=list(_bench_notes(run)),
        )
    )


def _subject(run: Run) -> str:
    task = run.spec.task if run.spec else None
    return ", ".join(part for part in (run.model_type, task) if part)


def _counts(run: Run) -> list[tuple[str, Shown]]:
    """Options of the plan and how many matrices have each."""
    counts = run.plan.pattern_counts if run.plan else {}
    return [
        (name, (run.figure("plan", name) or Figure(count, "checkpoint/nxm_plan.json")).shown("general"))
        for name, count in counts.items()
    ]


def _accuracy(run: Run) -> PageTable:
    rows: list[tuple[Cell, ...]] = []
    engine = main_engine(run)
    parity = engine.parity if engine else None
    if dense := dense_value(run):
        rows.append(("dense, FP32", dense.shown("score"), _interval(run.dense), ""))
    if run.compressed and (value := run.figure("checkpoint") or run.compressed.figure("value")):
        counts = ", ".join(f"{count} x {name}" for name, count in (run.plan.pattern_counts if run.plan else {}).items())
        if run.plan and run.plan.embedding == "int8":
            counts += ", INT8 embedding table"
        rows.append(("compressed, PyTorch", value.shown("score"), _interval(run.compressed), counts))
    low, high = run.figure("difference_interval", 0), run.figure("difference_interval", 1)
    if engine and parity and (value := compressed_value(run)):
        note: Cell = ""
        if low and high and low.number is not None and high.number is not None:
            note = ("difference to dense: ", low.shown("signed"), " to ", high.shown("signed"), " (95 %, paired)")
        rows.append(
            (f"compressed, engine {engine.name}", value.shown("score"), _interval(parity, "engine_interval"), note)
        )
    blind = run.summary.content.one_class if run.summary else None
    if blind and (value := run.figure("one_class", "value")):
        low, high = run.figure("one_class", "dense_gain", 0), run.figure("one_class", "dense_gain", 1)
        note = (f"{blind.label!r}; " if blind.label else "",)
        if low and high and low.number is not None and high.number is not None:
            note = (*note, "dense ", low.shown("signed"), " to ", high.shown("signed"), " from it (95 %, paired)")
        rows.append((f"no model: {blind.what} for all", value.shown("score"), "-", note))
    samples = dev_samples(run)
    on = f" on {samples.value} held-out samples" if samples else ""
    return PageTable(f"{metric(run)}{on}", ("model", f"#{metric(run)}", "#95 % interval", "note"), rows)


def _interval(source: RunFile[object] | None, key: str = "interval") -> Cell:
    return pair(source.figure(key, 0), source.figure(key, 1), "score") if source else "-"


def _compression(run: Run) -> PageTable:
    rows = [
        (counting, figure.shown("share"), COUNTED[counting])
        for counting in COUNTINGS
        if (figure := compression(run, counting))
    ]
    return PageTable(
        "Compression of the encoder's matrices, against FP32", ("counting", "#compression", "what is counted"), rows
    )


def _sizes(run: Run) -> PageTable:
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
    return PageTable("Bytes of files and engines", ("what", "kind", "#MB"), rows)


def _latency(run: Run) -> PageTable:
    speed = {(ratio.name, ratio.batch, ratio.sequence): ratio for ratio in ratios(run)}
    rows: list[tuple[Cell, ...]] = []
    for bench in run.benches:
        for number, timing in enumerate(bench.content.timings):
            shape = f"{timing.batch}x{timing.sequence}"
            median = run.figure("latency_ms", f"{timing.name} {shape}", "median")
            ratio = speed.get((timing.name, timing.batch, timing.sequence))
            first = timing.name == bench.content.reference
            low, high = (bench.figure("timings", number, "quartiles", side) for side in (0, 1))
            rows.append(
                (
                    Code(timing.name),
                    shape,
                    or_dash(median or bench.figure("timings", number, "median"), "milliseconds"),
                    pair(low, high, "milliseconds"),
                    ratio.pieces if ratio else "reference" if first else "not compared",
                )
            )
    return PageTable(
        "Latency, engines interleaved",
        ("engine", "batch x tokens", "#median ms", "#middle half, ms", "#speed against the first (95 %)"),
        rows,
    )


def _bench_notes(run: Run) -> Iterator[str]:
    for bench in run.benches:
        if bench.content.verdict:
            yield f"Verdict: {bench.content.verdict}"
        yield from (f"Not measured: {absent}" for absent in bench.content.unmeasured)


def _training(run: Run) -> PageTable:
    if run.compressed is None:
        return PageTable("Compression training", ("what", "value"), [])
    of_summary = {field.name for field in fields(TrainingFacts)}
    rows = []
    for key in _TRAINING_KEYS:
        figure = (run.figure("training", key) if key in of_summary else None) or run.compressed.figure(key)
        if figure and figure.value is not None:
            rows.append((key.replace("_", " "), figure.shown("general")))
    return PageTable("Compression training", ("what", "value"), rows)


def _stages(run: Run) -> PageTable:
    rows = []
    for name, record in run.stages.items():
        hashes = [f"{label} {digest}" for label, digest in record.inputs.items()]
        rows.append(
            (
                Code(name),
                Figure(record.seconds, MANIFEST, pointer("stages", name, "seconds")).shown("general"),
                "-" if record.seed is None else str(record.seed),
                Code(shlex.join(record.command)),
                Code(", ".join(hashes) or "none"),
            )
        )
    columns = ("stage", "#seconds", "#seed", "command", "inputs, sha256")
    return PageTable("Stages of the run", columns, rows, folded=f"Stages of the run ({len(rows)})")


def _versions(run: Run) -> PageTable:
    stages_by: dict[str, dict[str, list[str]]] = {}  # package -> version -> stages
    for stage, record in run.stages.items():
        for package, version in record.versions.items():
            stages_by.setdefault(package, {}).setdefault(version, []).append(stage)
    installed = installed_versions()
    rows = [
        (
            Code(package),
            next(iter(versions))
            if len(versions) == 1
            else "; ".join(f"{version} in {', '.join(stages)}" for version, stages in versions.items()),
            installed.get(package, "-"),
        )
        for package, versions in stages_by.items()
    ]
    columns = ("package", "version that made the run", "here, as this page was made")
    return PageTable("Versions", columns, rows, folded=f"Versions of packages ({len(rows)})")


def _engines(run: Run) -> PageTable:
    rows = []
    for engine in run.engines:
        if engine.passport is None:
            continue
        passport = engine.passport.content
        graph = passport.graph
        rows.append(
            (
                Code(engine.name),
                f"{passport.backend}, {graph.get('dtype', 'unknown')}, {graph.get('placement', 'unknown')}",
                passport.built_on,
                passport.created,
                Code(passport.engine_sha256),
                Code(passport.onnx_sha256),
                Code(json.dumps(passport.options, default=str)),
            )
        )
    return PageTable(
        "Engines, from their passports",
        (
            "engine", "backend, dtype, placement", "built on", "created", "engine sha256", "ONNX sha256", "options",
        ),
        rows,
        folded=f"Engines, from their passports ({len(rows)})",
    )  # fmt: skip
