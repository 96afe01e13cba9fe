"""Both placements of quantizers of one checkpoint on ONNX Runtime: accuracy, parity and interleaved latency."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import backend
from engines.parity import OUTPUTS_FILE
from nxm_export.engine_work import bench_engines, compare_engines
from nxm_export.errors import ArtifactError
from nxm_export.export import export
from nxm_export.metrics import metric_named
from nxm_export.run_dir import write_atomic
from nxm_export.terminal import Progress
from tools.results.run import machine, versions
from tools.results.tasks import Task, TaskFiles

PLACEMENTS = ("inputs-outputs", "inputs")
SHAPES = ((1, 32), (8, 64))


def measure(
    task: Task,
    files: TaskFiles,
    checkpoint: Path,
    dense: Path,
    file: Path,
    work: Path,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 30,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Export, build, compare on dev and time; write the facts to `file` and return them. Raises any `NxmError`."""
    engines = {"dense, FP32": _build(dense, None, work / "ort-fp32")}
    for number, placement in enumerate(PLACEMENTS):
        progress("export and build", number, len(PLACEMENTS))
        engines[f"compressed, INT8, {placement}"] = _build(checkpoint, placement, work / f"ort-int8-{placement}")
    progress("export and build", len(PLACEMENTS), len(PLACEMENTS))
    entries: list[dict[str, Any]] = []
    for number, (name, engine) in enumerate(engines.items()):
        progress("compare", number, len(engines))
        report = compare_engines(dense if not number else checkpoint, [engine], str(files.dev)).reports[0]
        outputs = np.load(engine / OUTPUTS_FILE)
        values = [metric_named(metric)(outputs["logits"], outputs["labels"]) for metric in task.metrics]
        entries.append(
            {
                "engine": name,
                "score": float(np.mean(values)),
                "agreement": report.outputs[0].agreement,
                "max_abs": report.outputs[0].max_abs,
                "passed": report.passed,
                "samples": report.samples,
            }
        )
    progress("compare", len(engines), len(engines))
    bench = bench_engines(list(engines.values()), shapes, rounds, threads)
    for entry, engine in zip(entries, engines.values(), strict=True):
        ratios = {(r.batch, r.sequence): r for r in bench.ratios if r.name == engine.name}
        entry["latency"] = [
            {
                "batch": timing.batch,
                "sequence": timing.sequence,
                "median": timing.median,
                "quartiles": timing.quartiles,
                "speedup": ratios[at].speedup if (at := (timing.batch, timing.sequence)) in ratios else None,
                "interval": ratios[at].interval if at in ratios else None,
            }
            for timing in bench.timings
            if timing.name == engine.name
        ]
    facts = {
        "schema": "nxm-placements/1",
        "task": task.title,
        "metric": task.metric_title,
        "samples": entries[0]["samples"],
        "rounds": rounds,
        "versions": versions(("onnxruntime", "onnx", "torch", "transformers", "numpy")),
        "machine": machine() | {"threads": threads or "all"},
        "engines": entries,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(facts, indent=1) + "\n")
    return facts


def _build(source: Path, placement: str | None, out: Path) -> Path:
    if not source.is_dir():
        raise ArtifactError(f"{source}: no such directory; give a checkpoint that `run` has left under its --work")
    graph = out.with_name(f"{out.name}.onnx")
    export(source, graph, target="cpu", placement=placement)
    out.mkdir(parents=True, exist_ok=True)
    backend("ort").build(graph / "model.onnx", out)
    return out
