"""A Hugging Face model card of a run, of a checkpoint or of one engine directory, from the files alone.

What the files do not say is listed as not known, for a person to fill in; the base model and the licence can be told
(`Origins`). A file that contradicts its passport or manifest makes no card: a card travels without its evidence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from nxm_export import __version__
from nxm_export.contract.checkpoint import PLAN_FILE
from nxm_export.contract.plan import COUNTINGS
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError
from nxm_export.reporting.engine_facts import EngineEntry
from nxm_export.reporting.figures import Figure, RunFile, Shown
from nxm_export.reporting.run_facts import Run, read_checkpoint, read_engine_directory, read_run
from nxm_export.reporting.verdicts import (
    COUNTED,
    Piece,
    Verdict,
    compressed_value,
    compression,
    dense_value,
    main_engine,
    metric,
    verdicts,
)
from nxm_export.storage.run_dir import MANIFEST

if TYPE_CHECKING:
    from engines.parity.reports import ParityReport
    from engines.passport import EnginePassport

# task -> what the hub calls it
PIPELINES = {
    "classification": "text-classification",
    "multi-label": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "embedding": "sentence-similarity",
    "reranking": "text-ranking",
}
# What the hub calls a metric where it has another word for it.
_HUB_METRICS = {"mcc": "matthews_correlation", "spearman": "spearmanr", "pearson": "pearsonr"}
_SECONDARY = list(dict.fromkeys(name for task in TASKS.values() for name in task.secondary_metrics))
_SPECIAL = re.compile(r"([\\`*_\[\]|#$~!])")


@dataclass(frozen=True)
class Origins:
    """What no file says: the hub id of the model that was compressed, and the licence of the result as the hub
    abbreviates it. None is not known."""

    base_model: str | None = None
    license: str | None = None

    def front_matter(self) -> dict[str, object]:
        """Fields of the YAML head."""
        head: dict[str, object] = {}
        if self.base_model is not None:
            head |= {"base_model": self.base_model, "base_model_relation": "quantized"}
        if self.license is not None:
            head["license"] = self.license
        return head

    def unknown(self) -> Iterator[str]:
        """What is still not known of these."""
        if self.base_model is None:
            yield "the base model's name (`nxm card --base-model` puts it into the head)"
        if self.license is None:
            yield "the licence of the base model, and of this model (`nxm card --license`)"


def _read(source: Path) -> Run:
    if (source / MANIFEST).is_file():
        return read_run(source)
    return read_checkpoint(source) if (source / PLAN_FILE).is_file() else read_engine_directory(source)


def render(source: Path, origins: Origins = Origins()) -> str:
    """The card of a run, a checkpoint or an engine directory; raises `ArtifactError` when it is none of them, or cannot
    be trusted."""
    run = _read(source)
    if run.doubts:
        raise ArtifactError(f"{source}: no card of files that contradict each other: {run.doubts[0]}")
    engine = main_engine(run) or next(iter(run.engines), None)
    task = run.spec.task if run.spec else None
    low, high = run.figure("difference_interval", 0), run.figure("difference_interval", 1)
    samples = run.figure("dev_samples") or (engine.parity.figure("samples") if engine and engine.parity else None)
    samples = samples or (run.compressed.figure("dev_samples") if run.compressed else None)
    counted = [(counting, compression(run, counting), COUNTED[counting]) for counting in COUNTINGS]
    scored = compressed_value(run)
    comparisons = [comparison for e in run.engines for comparison in e.comparisons]
    return (
        _environment()
        .get_template("card.md.j2")
        .render(
            run=run,
            name=run.name,
            front=_front_matter(run, engine, task, origins),
            model_type=run.model_type or "unknown",
            task=task or "unknown",
            labels=run.spec.labels if run.spec else (),
            max_length=run.spec.max_length if run.spec else None,
            options=_options(run, engine),
            metric=metric(run) if scored is not None and scored.value is not None else None,
            dense=_text(dense_value(run), "score"),
            compressed=_text(scored, "score"),
            low=_text(low, "signed"),
            high=_text(high, "signed"),
            samples=_text(samples, "general"),
            secondary=list(_secondary(run, engine)),
            compression=[(counting, _text(figure, "share"), what) for counting, figure, what in counted if figure],
            engines=[_engine(e, e.passport.content) for e in run.engines if e.passport is not None],
            parity=[row for name, report in comparisons for row in _parity(name, report)],
            reasons=dict.fromkeys(report.content.reason for _, report in comparisons if report.content.reason),
            verdicts=[_verdict(v) for v in verdicts(run) if v.state != "absent"],
            training=_training(run),
            **_usage(run, engine),
            unknown=[*origins.unknown(), *_unknown(run)],
            version=__version__,
        )
    )


def _environment() -> jinja2.Environment:
    """Templates of this package, in which everything is escaped for markdown unless it is marked safe."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("nxm_export", "reporting"),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else markdown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def markdown(text: str) -> str:
    """Text that markdown, and HTML inside it, shows as it is; on one line."""
    flat = re.sub(r"\s+", " ", text)
    return _SPECIAL.sub(r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _front_matter(run: Run, engine: EngineEntry | None, task: str | None, origins: Origins) -> Markup:
    """The YAML head. JSON is YAML, so every value is written as JSON."""
    tags = ["nxm-export", "onnx", *_option_tags(run, engine)]
    head = {**origins.front_matter(), "library_name": "onnx" if run.engines else "transformers", "tags": tags}
    if task in PIPELINES:
        head["pipeline_tag"] = PIPELINES[task]
    metrics = list(_index_metrics(run, engine))
    if metrics and task in PIPELINES:
        result = {
            "task": {"type": PIPELINES[task], "name": task},
            "dataset": {"name": "held-out data of the run", "type": "unknown", "split": "dev"},
            "metrics": metrics,
        }
        head["model-index"] = [{"name": run.name, "results": [result]}]
    lines = [f"{key}: {json.dumps(item)}" for key, item in head.items()]
    return Markup("\n".join(lines))


def _index_metrics(run: Run, engine: EngineEntry | None) -> Iterator[dict[str, object]]:
    """The metrics of the compressed model in the hub's form: its own name of a metric as ``type``, ours as ``name``."""
    value = compressed_value(run)
    if value is None:
        return
    named = {metric(run): value.value}
    for name in _SECONDARY:
        figure = _secondary_figure(run, engine, name)
        if figure is not None:
            named[name] = figure.value
    for name, number in named.items():
        if number is not None:
            yield {"type": _HUB_METRICS.get(name, name), "name": name, "value": number, "verified": False}


def _secondary_figure(run: Run, engine: EngineEntry | None, name: str) -> Figure | None:
    """A further metric of the engine, or else of the checkpoint."""
    of_engine = engine.parity.figure("secondary_metrics", name, 1) if engine and engine.parity else None
    return of_engine or (run.compressed.figure("secondary_metrics", name) if run.compressed else None)


def _options(run: Run, engine: EngineEntry | None) -> Mapping[str, int]:
    """Matrices by option of the plan."""
    if run.plan is not None:
        return run.plan.pattern_counts
    plan = engine.passport.content.plan if engine and engine.passport else None
    return plan.options if plan else {}


def _option_tags(run: Run, engine: EngineEntry | None) -> Iterator[str]:
    parts = [part for option in _options(run, engine) for part in option.split("+")]
    for part in dict.fromkeys(parts):
        if part.startswith("W") and part[1:].isdecimal():
            yield f"int{part[1:]}"
        elif ":" in part:
            yield f"sparsity-{part.replace(':', '-')}"


def _engine(engine: EngineEntry, passport: EnginePassport) -> dict[str, str]:
    packages = {"ort": "onnxruntime", "openvino": "openvino", "trt": "tensorrt", "trt_rtx": "tensorrt-rtx-cu13"}
    packages["cusparselt"] = "torch"
    version = passport.versions.get(packages.get(passport.backend, ""), "")
    graph, device = passport.graph, passport.device
    return {
        "name": engine.name,
        "backend": f"{passport.backend} {version}".strip(),
        "graph": f"{graph.get('dtype', 'unknown')}, {graph.get('placement', 'unknown')}",
        "device": device.get("gpu") or device.get("name") or "unknown",
        "megabytes": _text(engine.bytes, "megabytes"),
        "requires": ", ".join(f"{key} {value}" for key, value in passport.requires.items()) or "none",
        "sha256": passport.engine_sha256,
    }


def _parity(name: str, report: RunFile[ParityReport]) -> Iterator[dict[str, object]]:
    kinds = {"agreement": "share", "max_abs": "error", "max_tolerance": "error", "passed": "general"}
    for number, output in enumerate(report.content.outputs):
        shown = {key: _text(report.figure("outputs", number, key), kind) for key, kind in kinds.items()}
        yield {**shown, "name": name, "output": output.output, "samples": report.content.samples}


def _verdict(verdict: Verdict) -> dict[str, object]:
    return {
        "title": verdict.title,
        "word": verdict.word,
        "note": verdict.note,
        "rows": [(row.label, _pieces(row.pieces)) for row in verdict.rows],
    }


def _pieces(pieces: tuple[Piece, ...]) -> str:
    return "".join(piece.text if isinstance(piece, Shown) else piece for piece in pieces)


def _text(figure: Figure | None, kind: str) -> str:
    return "not known" if figure is None else figure.shown(kind).text


def _secondary(run: Run, engine: EngineEntry | None) -> Iterator[tuple[str, str, str]]:
    """Further metrics of the task: (name, of the dense model, of the engine or else of the checkpoint)."""
    for name in _SECONDARY:
        compressed = _secondary_figure(run, engine, name)
        if compressed is not None:
            dense = run.dense.figure("secondary_metrics", name) if run.dense else None
            yield name, _text(dense, "score"), _text(compressed, "score")


def _training(run: Run) -> dict[str, str]:
    """The facts of compression training, without the metric, which stands elsewhere."""
    figures = run.compressed.figures() if run.compressed else ()
    shown = ("kind", "metric", "value", "interval", "secondary_metrics")
    return {
        " ".join(str(key).replace("_", " ") for key in keys): figure.shown("general").text
        for keys, figure in figures
        if keys[0] not in shown
    }


def _usage(run: Run, engine: EngineEntry | None) -> dict[str, Markup]:
    """Names for the lines of Python: identifiers only, whatever the files say."""
    backend = engine.passport.content.backend if engine and engine.passport else "ort"
    names = [name for name in run.spec.inputs if name.isidentifier()] if run.spec else ["input_ids"]
    return {
        "backend": Markup(backend if backend.isidentifier() else "ort"),
        "feeds": Markup(", ".join(f'"{name}": {name}' for name in names)),
    }


def _unknown(run: Run) -> Iterator[str]:
    """What a reader of a card looks for and no file says."""
    yield "the languages, and where the training and evaluation data come from and under which terms"
    yield "intended uses, limits and biases: compression keeps those of the base model, and may change them"
    if dense_value(run) is None or run.figure("difference_interval", 0) is None:
        yield "how far it is from the dense model: there is no paired comparison with it"
    if run.compressed is not None and not run.compressed.content.dev_labelled:
        yield "how accurate it is: there were no labelled data to score it on"
    if not any(engine.parity for engine in run.engines):
        yield "whether the engine computes what its checkpoint computes: it was not compared"
    if not (run.benches or run.summary):
        yield "how fast it is: it was not timed"
    if not any(row.chosen is True for engine in run.engines for row in engine.matrices):
        yield "whether any matrix runs on a sparse kernel: no engine proves it"
    for gap in run.missing:
        if gap.command is None:
            yield f"{gap.what}: {gap.why}"
