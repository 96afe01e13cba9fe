"""The first line of what a command prints: what it came to, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.cli.tables import score_text, share_text

if TYPE_CHECKING:
    from engines.benchmark.http_load import LoadReport
    from engines.benchmark.latency import BenchReport
    from engines.benchmark.text_throughput import TextReport
    from nxm_export.contract.packed_checkpoint import PackedSizes
    from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, Measure
    from nxm_export.contract.records.search_result import SearchResult
    from nxm_export.pipeline.environment import MachineReport
    from nxm_export.pipeline.inspection import CheckpointFacts, EngineInspection, GraphFacts


def of_compression(metrics: CompressionMetrics) -> str:
    """What the compressed checkpoint scores, and how far its answers are from the dense model's. Whether the scores
    differ, `nxm run` says, with a paired interval."""
    if not metrics.dev_labelled:
        return f"Compressed: {_apart(metrics)} on {metrics.dev_samples} texts without labels, so there is no score."
    low, high = metrics.interval or (None, None)
    interval = "no interval" if low is None or high is None else f"{low:.4f} to {high:.4f}, 95 %"
    score = f"Compressed: {metrics.metric} {score_text(metrics.value)} ({interval}) on {metrics.dev_samples} samples."
    if metrics.distance_measure is None:
        return score
    return f"{score}\nDense: {metrics.metric} {score_text(metrics.dense_value)}; {_apart(metrics)}."


def _apart(metrics: CompressionMetrics) -> str:
    """How far the answers are from the dense model's."""
    assert metrics.distance_measure is not None
    same = "" if metrics.same_answers is None else f"{share_text(metrics.same_answers)} of the answers are the same, "
    return same + _DISTANCES[metrics.distance_measure].format(score_text(metrics.distance_to_dense))


_DISTANCES: dict[Measure, str] = {
    "kl": "KL(dense || compressed) {} nats",
    "squared-error": "mean squared difference {}",
    "relative-squared-distance": "mean squared distance {} of the squared length",
}


def of_search(result: SearchResult) -> str:
    """What the best plan saves, and how far it is from the dense model before training."""
    saved = f"{result.best.hw:.2%} of the bits, as tensor cores store them"
    chosen_by = f"on the {result.samples.held_out} samples that it was chosen by"
    apart = "no number" if result.best.joint is None else f"{result.best.joint:.4g}, {chosen_by}"
    return f"Found a plan that saves {saved}.\nIts divergence without training is {apart}."


def of_packing(sizes: PackedSizes, checkpoint: Path) -> str:
    """The packed file beside the weights that it was made from."""
    from nxm_export.contract.checkpoint import WEIGHTS_FILE

    weights = (checkpoint / WEIGHTS_FILE).stat().st_size
    return f"Packed: {sizes.file_bytes / 1e6:.1f} MB, from {weights / 1e6:.1f} MB of weights."


def of_checkpoint(facts: CheckpointFacts) -> str:
    """What a model directory holds."""
    task = "no known task" if facts.task is None else facts.task
    model = f"{facts.model_type} for {task}, {facts.weight_bytes / 1e6:.1f} MB of weights"
    if not facts.plan:
        return f"A dense model: {model}."
    counts = ", ".join(f"{count} x {name}" for name, count in facts.plan.items())
    return f"A compressed checkpoint: {model}.\n{counts}: {facts.compression['hw']:.2%} of these matrices' bits saved."


def of_graph(facts: GraphFacts) -> str:
    """What an ONNX file holds."""
    opset = "no opset" if facts.opset is None else f"opset {facts.opset}"
    return f"An ONNX graph: {opset}, {sum(facts.operators.values())} operators of {len(facts.operators)} kinds."


def of_engine(facts: EngineInspection) -> str:
    """What an engine directory holds. Where sparse kernels are known, their own sentence follows."""
    return f"An engine of backend {facts.passport.backend}, built on {facts.passport.built_on}."


def of_build(facts: Mapping[str, object], *, twins: bool) -> str:
    """What was built, and that nothing of it is proven yet."""
    what = f"three {facts['backend']} engines (FP16, dense, sparse)" if twins else f"{facts['backend']} engine"
    return f"Built {what} {facts['path']}; not compared with its checkpoint yet."


def of_machine(machine: MachineReport) -> str:
    """Which backends run here; one that only builds is not called ready."""
    from nxm_export.pipeline.environment import missing_for

    run = [name for name in machine.backends if missing_for(name) is None]
    build = [name for name, state in machine.backends.items() if name not in run and state.startswith("ready")]
    others = [name for name in machine.backends if name not in (*run, *build)]
    only = f"Build here, and run elsewhere: {', '.join(build)}. " if build else ""
    return f"Run here: {', '.join(run) or 'no backend'}.\n{only}Missing: {', '.join(others) or 'none'}."


def of_bench(report: BenchReport) -> str:
    """How each engine compares with the first over all shapes: faster where every interval lies above 1."""
    if not report.ratios:
        if len({timing.name for timing in report.timings}) == 1:
            return f"{report.timings[0].name} alone was timed: there is nothing to compare it with."
        return f"No comparison: {'; '.join(report.unmeasured)}."
    if report.too_few_rounds is not None:
        return f"No comparison: {report.too_few_rounds}."
    sentences = []
    for name in dict.fromkeys(ratio.name for ratio in report.ratios):
        ratios = [ratio for ratio in report.ratios if ratio.name == name]
        words = {_word(ratio.interval) for ratio in ratios}
        found = words & {"faster", "slower"}
        some = "faster or slower, by shape" if len(found) == 2 else f"{''.join(found)} at some shapes"
        sentences.append(f"{name}: {words.pop() if len(words) == 1 else some}")
    return f"Against {report.ratios[0].reference}: {'; '.join(sentences)}."


def _word(interval: tuple[float, float]) -> str:
    return "faster" if interval[0] > 1 else "slower" if interval[1] < 1 else "no difference found"


def of_text(report: TextReport) -> str:
    """The most sentences a second that an engine reached."""
    best = max(report.timings, key=lambda timing: timing.sentences_per_second)
    return f"At most {best.sentences_per_second:.1f} sentences a second: {best.name}, order {best.order}."


def of_load(report: LoadReport) -> str:
    """The most answers a second that a server gave, and whether all were answers."""
    best = max(report.results, key=lambda result: result.throughput)
    failed = sum(count for result in report.results for count in result.errors.values())
    return (
        f"At most {best.throughput:.1f} answers a second: {best.name}, {best.clients} clients; "
        f"{failed or 'no'} requests failed."
    )
