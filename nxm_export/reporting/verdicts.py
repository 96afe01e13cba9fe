"""The five answers at the top of a report: accuracy, size, speed, sparsity, parity; each with a word that does not
flatter.

A difference whose interval holds 0 is not called equal, a speed-up whose interval holds 1 is not called faster, and
what nobody saw is called unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nxm_export.reporting.engine_facts import EngineEntry, worst_output
from nxm_export.reporting.figures import Figure, RunFile, Shown
from nxm_export.reporting.matrices import Matrix
from nxm_export.reporting.run_facts import Run
from nxm_export.storage.versions import MAKERS

if TYPE_CHECKING:
    from nxm_export.contract.records.speedup import Speedup

GOOD, BAD, OPEN, ABSENT = "good", "bad", "open", "absent"
NO_DIFFERENCE = "no difference found"
DENSE_NOT_SHOWN = "dense not shown to beat "  # before what it is not shown to beat
Piece = str | Shown
COUNTED = {
    "hw": "2:4 as tensor cores store it, index and scales included",
    "packed": "as nxm pack stores it, index and scales included",
    "values": "kept values alone, as papers count",
}


@dataclass(frozen=True)
class VerdictRow:
    """One number of a verdict: what it is, and the pieces of its text."""

    label: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Verdict:
    """`state` is one of good, bad, open (undecided or unknown) and absent; `word` says it in text, `note` why."""

    key: str
    title: str
    state: str
    word: str
    rows: tuple[VerdictRow, ...] = ()
    note: str = ""
    lead: tuple[Piece, ...] = field(default=())


def verdicts(run: Run) -> list[Verdict]:
    """All five, in the order of a page."""
    return [_accuracy(run), _size(run), _speed(run), _sparse(run), _parity(run)]


def main_engine(run: Run) -> EngineEntry | None:
    """The compressed engine that the summary's numbers are about; without a summary the first one of ONNX Runtime with
    a plan."""
    chosen = run.summary.content.chosen if run.summary else None
    if chosen is not None:
        return next((engine for engine in run.engines if engine.name == chosen.name), None)
    engines = [engine for engine in run.engines if engine.passport and engine.passport.content.plan]
    exact = [engine for engine in engines if engine.name in ("ort-cpu-int8", "ort-cpu-sparse")]
    return next(iter([*exact, *engines]), None)


def mixed_versions(run: Run) -> list[str]:
    """Packages of which other versions made one stage than made another."""
    found = {package: {record.versions.get(package) for record in run.stages.values()} - {None} for package in MAKERS}
    return [package for package, versions in found.items() if len(versions) > 1]


def dense_value(run: Run) -> Figure | None:
    """The dense model's metric."""
    return run.figure("dense") or (run.dense.figure("value") if run.dense else None)


def compressed_value(run: Run) -> Figure | None:
    """The compressed engine's metric, or the checkpoint's where no engine was compared."""
    engine = main_engine(run)
    measured = engine.parity.figure("engine_value") if engine and engine.parity else None
    return run.figure("compressed") or measured or (run.compressed.figure("value") if run.compressed else None)


def dev_samples(run: Run) -> Figure | None:
    """How many held-out samples the metric is of."""
    return run.figure("dev_samples") or (run.dense.figure("dev_samples") if run.dense else None)


def metric(run: Run) -> str:
    """The metric's name."""
    engine = main_engine(run)
    if run.summary:
        return run.summary.content.metric
    if run.dense:
        return run.dense.content.metric
    if run.compressed:
        return run.compressed.content.metric
    return engine.parity.content.metric if engine and engine.parity else "metric"


def _accuracy(run: Run) -> Verdict:
    title, name = "Accuracy kept", metric(run)
    dense, compressed = dense_value(run), compressed_value(run)
    if dense is None or compressed is None:
        return Verdict(
            "accuracy", title, ABSENT, "not measured", note="The dense or the compressed model is not there yet."
        )
    rows = [VerdictRow("dense", (dense.shown("score"),)), VerdictRow("compressed", (compressed.shown("score"),))]
    low, high = run.figure("difference_interval", 0), run.figure("difference_interval", 1)
    lead: tuple[Piece, ...] = (compressed.shown("score"), f" {name}, dense ", dense.shown("score"))
    if low is None or high is None or low.number is None or high.number is None:
        return Verdict(
            "accuracy", title, OPEN, "no interval", tuple(rows), "Without a paired interval nothing is claimed.", lead
        )
    rows.append(VerdictRow("difference, 95 % paired", (low.shown("signed"), " to ", high.shown("signed"))))
    if samples := dev_samples(run):
        rows.append(VerdictRow("measured", ("on ", samples.shown("general"), " held-out samples")))
    blind = run.summary.content.one_class if run.summary else None
    if blind and (reached := run.figure("one_class", "value")):
        rows.append(
            VerdictRow(f"{blind.what} for all", (reached.shown("score"), f" ({blind.label})" * bool(blind.label)))
        )
    doubted = blind.what if blind is not None and blind.dense_is_better is False else ""
    if high.number < 0:
        state, word, note = BAD, "worse than dense", "The whole interval lies below 0."
    elif low.number > 0:
        state, word, note = GOOD, "better than dense", "The whole interval lies above 0."
    elif doubted:
        state, word = OPEN, DENSE_NOT_SHOWN + doubted
        note = "The interval holds 0, and nothing is shown to be kept."
    else:
        state, word = OPEN, NO_DIFFERENCE
        note = "The interval holds 0: these samples show no difference between the two models. "
        note += "That is not proof that they are equal."
    if doubted:
        note += f" These samples do not show that the dense model is better than {doubted} for every sample."
    return Verdict("accuracy", title, state, word, tuple(rows), note, lead)


def compression(run: Run, counting: str) -> Figure | None:
    """1 - compressed/FP32 of the planned matrices by a counting."""
    if figure := run.figure("compression", counting):
        return figure
    if run.plan is not None:
        return Figure(run.plan.compression(counting), "checkpoint/nxm_plan.json")
    engine = main_engine(run)
    return engine.passport.figure("plan", "compression", counting) if engine and engine.passport else None


def _size(run: Run) -> Verdict:
    title = "Size"
    hw = compression(run, "hw")
    packed, values = compression(run, "packed"), compression(run, "values")
    if hw is None or packed is None or values is None:
        return Verdict("size", title, ABSENT, "no plan", note="Nothing has been compressed in this run yet.")
    rows = [
        VerdictRow("stored as tensor cores read 2:4", (hw.shown("share"), " saved")),
        VerdictRow("stored as nxm pack does", (packed.shown("share"), " saved")),
        VerdictRow("kept values alone, as papers count", (values.shown("share"), " saved")),
    ]
    if run.plan is not None:
        for label, sparse in (
            ("matrices in an INT8 engine, dense", False),
            ("matrices in an INT8 engine, 2:4 kernels", True),
        ):
            size = Figure(run.plan.engine_bytes(sparse=sparse), "checkpoint/nxm_plan.json")
            rows.append(VerdictRow(label, (size.shown("megabytes"), " MB")))
    if (engine := main_engine(run)) and engine.bytes:
        rows.append(VerdictRow(f"engine file {engine.name}, all of it", (engine.bytes.shown("megabytes"), " MB")))
    note = "Shares are of the planned matrices against FP32; embeddings, biases and norms are not counted. An engine "
    note += "keeps every code in 8 bits, and zeros too, unless a 2:4 kernel runs."
    lead: tuple[Piece, ...] = (hw.shown("share"), " of the matrices' bits saved")
    smaller = hw.number is not None and hw.number > 0
    return Verdict("size", title, GOOD if smaller else BAD, "smaller" if smaller else "larger", tuple(rows), note, lead)


@dataclass(frozen=True)
class RatioFigures:
    """The speed-up of one engine at one shape, with its 95 % interval, and the numbers by themselves."""

    name: str
    reference: str
    batch: int
    sequence: int
    speedup: Figure
    low: Figure
    high: Figure
    interval: tuple[float, float]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The speed-up and its interval as they are written."""
        return (self.speedup.shown("ratio"), "x (", self.low.shown("ratio"), " to ", self.high.shown("ratio"), ")")


def ratios(run: Run, engine: str | None = None) -> list[RatioFigures]:
    """The speed-ups of a run with their places, those of one `engine` or all."""
    return [ratio for ratio in _ratios(run) if engine in (None, ratio.name)]


def _ratios(run: Run) -> Iterator[RatioFigures]:
    if run.summary:
        for number, speedup in enumerate(run.summary.content.speedup):
            yield _ratio(run.summary, "speedup", number, speedup)
        return
    for bench in run.benches:
        for number, ratio in enumerate(bench.content.ratios):
            yield _ratio(bench, "ratios", number, ratio)


def _ratio(source: RunFile[object], key: str, number: int, ratio: Speedup) -> RatioFigures:
    figures = [source.figure(key, number, *keys) for keys in (("speedup",), ("interval", 0), ("interval", 1))]
    speedup, low, high = (figure for figure in figures if figure is not None)
    shape = (ratio.batch, ratio.sequence)
    return RatioFigures(ratio.name, ratio.reference, *shape, speedup, low, high, ratio.interval)


def _speed(run: Run) -> Verdict:
    title, engine = "Speed", main_engine(run)
    measured = ratios(run, engine.name if engine else None)
    if engine is None or not measured:
        return Verdict("speed", title, ABSENT, "not timed", note="No engine of this run was timed against another.")
    rows = tuple(VerdictRow(f"batch {ratio.batch} x {ratio.sequence} tokens", ratio.pieces) for ratio in measured)
    if chosen := run.summary.content.chosen if run.summary else None:
        rows = (*rows, VerdictRow(f"backend {chosen.backend} was kept", (chosen.why,)))
    state, word = _word_of_speed([ratio.interval for ratio in measured])
    slowest = min(measured, key=lambda ratio: ratio.speedup.number or 0.0)
    shape = f"{slowest.batch}x{slowest.sequence}"
    among = f", the slowest of {len(measured)} shapes" if measured[1:] else ""
    lead: tuple[Piece, ...] = (slowest.speedup.shown("ratio"), f"x at {shape}{among}")
    note = f"{engine.name} against {slowest.reference}, 95 % intervals of paired rounds{_timed_on(run, engine)}."
    return Verdict("speed", title, state, word, rows, note, lead)


def _timed_on(run: Run, engine: EngineEntry) -> str:
    """Where an engine was timed, in words; of an older bench, which does not say, where it was built."""
    timed = [bench.content for bench in run.benches if any(t.name == engine.name for t in bench.content.timings)]
    machines = {report.machine for report in timed}
    if len(machines) == 1 and (machine := machines.pop()) is not None:
        return f", on {machine}"
    device = engine.passport.content.device.get("name") if engine.passport else None
    return f"; built on {device}" if device else ""


def _word_of_speed(intervals: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """(state, word) of the intervals of all shapes. One that lies below 1 is a difference that was found."""
    faster, slower = sum(low > 1 for low, _ in intervals), sum(high < 1 for _, high in intervals)
    if faster == len(intervals):
        return GOOD, "faster"
    if slower == len(intervals):
        return BAD, "slower"
    if faster and slower:
        return OPEN, "faster or slower, by shape"
    if faster:
        return OPEN, "faster at some shapes"
    if slower:
        return OPEN, "slower at some shapes"
    return OPEN, NO_DIFFERENCE


def _sparse(run: Run) -> Verdict:
    title = "Sparse"
    planned, for_kernels = planned_sparse(run)
    if run.plan is None:
        return Verdict("sparse", title, ABSENT, "no plan", note="Nothing has been compressed in this run yet.")
    if not planned:
        return Verdict("sparse", title, OPEN, "not planned", note="The plan gives no matrix a pattern.")
    checked = [matrix for matrix in planned if matrix.pattern]
    stored = [matrix for matrix in checked if not matrix.problems and all(matrix.pattern.values())]
    rows = [
        VerdictRow("planned N:M", (f"{len(planned)} of {len(run.matrices)} matrices",)),
        VerdictRow(
            "found in the stored numbers",
            (f"{len(stored)} of {len(planned)}" if checked else "no graph was checked",),
        ),
        *(row for engine in run.engines if engine.sparse_kernels for row in _kernel_rows(run, engine)),
    ]
    if any(engine.passport and engine.passport.content.backend == "ort" for engine in run.engines):
        rows.append(VerdictRow("runs on sparse kernels, ONNX Runtime", ("none: it has no such kernels",)))
    if len(stored) < len(checked):
        return Verdict(
            "sparse", title, BAD, "pattern broken", tuple(rows), "A stored matrix breaks the pattern of its plan."
        )
    lead = (f"{len(stored)} of {len(planned)} stored N:M",)
    proved, of_engine = max((proved_sparse(engine) for engine in run.engines), default=(0, 0))
    # A plan of 4:8 is no 2:4, which sparse kernels need: such a matrix is none of those that an engine could prove.
    if proved == of_engine >= len(planned) == len(for_kernels) == len(stored):
        return Verdict("sparse", title, GOOD, "stored and run", tuple(rows), "", lead)
    if proved:
        if not checked:
            return Verdict("sparse", title, OPEN, "run; stored not checked", tuple(rows), "No graph was checked.", lead)
        note = "The other matrices run dense, or their kernel was not seen."
        return Verdict("sparse", title, OPEN, "stored; run in part", tuple(rows), note, lead)
    note = "Whether a 2:4 kernel runs is only known on the GPU. Until an engine proves it, it is called unknown."
    if not checked:
        return Verdict(
            "sparse", title, OPEN, "planned; stored not checked", tuple(rows), f"No graph was checked. {note}"
        )
    return Verdict("sparse", title, OPEN, "stored; running unknown", tuple(rows), note, lead)


def planned_sparse(run: Run) -> tuple[list[Matrix], list[Matrix]]:
    """(matrices that the plan gives a pattern, those of them whose pattern sparse kernels can run) of a run."""
    patterns = [(matrix, matrix.spec.pattern) for matrix in run.matrices]
    planned = [(matrix, pattern) for matrix, pattern in patterns if pattern is not None]
    return [matrix for matrix, _ in planned], [matrix for matrix, pattern in planned if pattern.implies_2_4]


def proved_sparse(engine: EngineEntry) -> tuple[int, int]:
    """(planned-sparse matrices that are proved to run on sparse kernels, all planned-sparse ones) of an engine."""
    planned = [row for row in engine.matrices if row.planned_sparse]
    return sum(row.chosen is True for row in planned), len(planned)


def _kernel_rows(run: Run, engine: EngineEntry) -> Iterator[VerdictRow]:
    """Which products of an engine run on integers, and which of its planned-sparse matrices on sparse kernels."""
    integer, products = (_option(run, engine, key) for key in ("integer_products", "planned_products"))
    if integer and products:
        pieces = (integer.shown("general"), " of ", products.shown("general"), " planned")
        yield VerdictRow(f"INT8 matrix products, {engine.name}", pieces)
    planned = [row for row in engine.matrices if row.planned_sparse]
    proved = sum(row.chosen is True for row in planned)
    unknown = sum(row.chosen is None for row in planned)
    text = f"{proved} of {len(planned)} proved" if planned else "unknown"
    yield VerdictRow(f"runs on sparse kernels, {engine.name}", (text + (f", {unknown} unknown" if unknown else ""),))


def _option(run: Run, engine: EngineEntry, key: str) -> Figure | None:
    """A fact of a TensorRT build: the summary has those of the RTX engine, every passport its own."""
    summed = run.figure("trt_rtx", key) if engine.name.startswith("trt_rtx") else None
    return summed or (engine.passport.figure("options", key) if engine.passport else None)


def _parity(run: Run) -> Verdict:
    title = "Parity"
    compared = [engine for engine in run.engines if engine.parity or engine.failed_by]
    broken = run.summary.content.failed if run.summary else {}
    if not (compared or broken):
        return Verdict("parity", title, ABSENT, "not compared", note="No engine was compared with its checkpoint.")
    failed = [engine for engine in compared if engine.failed_by or engine.name in broken]
    rows = []
    for engine in compared:
        measured = worst_output(engine.parity, "agreement", least=True) if engine.parity else None
        agreement = run.figure("parity", engine.name, "agreement") or measured
        word = "FAIL" if engine in failed else "pass"
        pieces: tuple[Piece, ...] = (word,)
        if agreement and agreement.value is not None:  # of scores and embeddings there is no argmax
            pieces = (word, ", ", agreement.shown("share"), " equal argmax")
        if engine.parts_in:
            pieces = (*pieces, f"; parts from the checkpoint in {engine.parts_in}")
        if engine.failed_by:
            pieces = (*pieces, f"; failed in {engine.failed_by}")
        elif engine in failed:
            pieces = (*pieces, f"; {broken[engine.name]}")
        pieces = (
            *pieces,
            *(f": {report.content.failure}" for _, report in engine.comparisons if report.content.failure),
        )
        rows.append(VerdictRow(engine.name, pieces))
    unmade = [name for name in broken if name not in {engine.name for engine in compared}]
    rows += [VerdictRow(name, (f"FAIL: {broken[name]}",)) for name in unmade]
    others = [engine.name for engine in run.engines if engine not in compared and engine.name not in broken]
    note = "Each engine against its own checkpoint in PyTorch, on the same samples, with a measured tolerance."
    if others:
        note += f" Not compared: {', '.join(others)}."
    if mixed := mixed_versions(run):
        note += f" Stages of this run were made by different versions of {', '.join(mixed)}: see Versions below."
    lead = (f"{len(compared) - len(failed)} of {len(compared)} engines compared pass",)
    if unmade:
        lead = (f"{lead[0]}; {len(unmade)} could not be built or run",)
    if failed or unmade:
        return Verdict("parity", title, BAD, "failed", tuple(rows), note, lead)
    return Verdict("parity", title, GOOD, "passed", tuple(rows), note, lead)
