"""What a run comes to: every number read back from the file of the stage that measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nxm_export.contract.checkpoint_metrics import read_metrics
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.plan import COUNTINGS, CompressionPlan
from nxm_export.errors import ArtifactError, EngineError, ParityError
from nxm_export.storage.json_files import read_json, require_schema
from nxm_export.storage.run_dir import RunDir

SUMMARY_SCHEMA = "nxm-summary/1"


def kind_of(plan: CompressionPlan) -> str:
    """What the engines of the plan are called: ``int8``, or ``sparse`` where it leaves all weights in float."""
    return "int8" if any(spec.weight_bits for spec in plan.weights.values()) else "sparse"


def read_summary(root: str | Path) -> dict[str, Any]:
    """The summary of a finished run; raises `ArtifactError` for a directory that is no run or not finished."""
    directory = RunDir.open(root)
    file = directory.path("summary", "summary.json")
    if not file.is_file():
        raise ArtifactError(f"{root}: this run has no summary yet; run the same `nxm run` again to finish it")
    summary = read_json(file, "run the same `nxm run` again")
    require_schema(summary, SUMMARY_SCHEMA, str(file), ArtifactError)
    return _at(summary, directory.root)


def require_passed(summary: Mapping[str, Any]) -> None:
    """Raise `ParityError` for an engine that differs from its checkpoint, `EngineError` for one that could not be built."""
    differing = [name for name, report in summary["parity"].items() if not report["passed"]]
    if differing:
        raise ParityError(
            f"parity failed for {', '.join(differing)}: see {summary['artifacts'][f'parity {differing[0]}']}"
        )
    for name, why in summary["failed"].items():
        raise EngineError(f"{name} could not be built: {why}")


def _at(summary: dict[str, Any], root: Path) -> dict[str, Any]:
    """The summary with its artifacts' paths, which are stored relative to the run, from where the run lies now."""
    return {**summary, "artifacts": {name: str(root / path) for name, path in summary["artifacts"].items()}}


def summarize(
    directory: RunDir,
    plan: CompressionPlan,
    graphs: Sequence[str],
    engines: Mapping[str, str],
    missing: Mapping[str, str],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """The numbers of the run; paths are relative to it.

    `missing` says which engines were not built or not run and why, `failed` which could not be built.
    """
    import numpy as np

    from engines.parity.decisions import cosines
    from nxm_export.contract.tasks import TASKS
    from nxm_export.data.metrics import paired_interval, scored_outputs

    def read(*parts: str) -> dict[str, Any]:
        return dict(read_json(directory.path(*parts), "run the same `nxm run` again"))

    dense, compressed = (read_metrics(directory.path(stage)) for stage in ("dense", "checkpoint"))
    latency = read("bench", "latency.json")
    compared = [name for name in engines if name not in missing]
    reports = {name: read("compare", name, "parity.json") for name in compared}
    main, reference = f"ort-cpu-{kind_of(plan)}", "ort-cpu-fp32"
    outputs = {name: np.load(directory.path("compare", name, "outputs.npz")) for name in (main, reference)}
    labels, groups = outputs[main]["labels"], outputs[main].get("groups")
    task = TASKS[load_spec(directory.path("onnx", "cpu")).task]
    first = reports[main]["outputs"][0]["output"]
    alike = cosines(outputs[reference][first], outputs[main][first]) if task.output_kind == "vector" else None
    rtx = next((name for name in engines if name.startswith("trt_rtx")), None)
    return {
        "schema": SUMMARY_SCHEMA,
        "metric": dense.metric,
        "dev_samples": dense.dev_samples,
        "dense": dense.value,
        "compressed": reports[main]["engine_value"],
        "difference_interval": paired_interval(
            dense.metric,
            scored_outputs(task, outputs[main]),
            scored_outputs(task, outputs[reference]),
            labels,
            classes=load_spec(directory.path("onnx", "cpu")).labels,
            groups=groups,
        ),
        **({} if alike is None else {"cosine_to_dense": {"mean": float(alike.mean()), "least": float(alike.min())}}),
        "checkpoint": compressed.value,
        "compression": {counting: plan.compression(counting) for counting in COUNTINGS},
        "plan": plan.pattern_counts,
        "embedding": plan.embedding,
        "parity": {
            name: {
                "agreement": min(output["agreement"] for output in report["outputs"]),
                "max_abs": max(output["max_abs"] for output in report["outputs"]),
                "passed": report["passed"],
                "value": report["engine_value"],
            }
            for name, report in reports.items()
        },
        "latency_ms": {
            f"{timing['name']} {timing['batch']}x{timing['sequence']}": {
                "batch": timing["batch"],
                "seq": timing["sequence"],
                "median": timing["median"],
            }
            for timing in latency["timings"]
        },
        "speedup": latency["ratios"],
        "onnx_bytes": {name: directory.path("onnx", name, "model.onnx").stat().st_size for name in graphs},
        "trt_rtx": read("engines", rtx, "passport.json")["options"] if rtx else None,
        "missing": dict(missing),
        "failed": dict(failed),
        "training": {
            key: getattr(compressed, key)
            for key in (
                "recipe",
                "admm_steps",
                "qat_steps",
                "residual",
                "residual_gate_passed",
                "mask_hash",
                "table_drop",
            )
        },
        "artifacts": {
            "dense": "dense",
            "checkpoint": "checkpoint",
            **{f"onnx {name}": f"onnx/{name}/model.onnx" for name in graphs},
            **{f"engine {name}": f"engines/{name}" for name in engines},
            **{f"parity {name}": f"compare/{name}/parity.json" for name in compared},
        },
    }
