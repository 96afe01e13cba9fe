"""The five answers at the top of a report: accuracy, size, speed, sparsity, parity; each with a word that does not flatter.

A difference whose interval holds 0 is not called equal, a speed-up whose interval holds 1 is not called faster, and what
nobody saw is called unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nxm_export.reporting.figures import Figure, Shown
from nxm_export.reporting.run_facts import Engine, Run, worst_output

GOOD, BAD, OPEN, ABSENT = "good", "bad", "open", "absent"
Piece = str | Shown
COUNTED = {
    "hw": "2:4 as tensor cores store it, index and scales included",
    "packed": "smallest lossless file, index and scales included",
    "values": "kept values alone, as papers count",
}


@dataclass(frozen=True)
class Row:
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
    rows: tuple[Row, ...] = ()
    note: str = ""
    lead: tuple[Piece, ...] = field(default=())


def verdicts(run: Run) -> list[Verdict]:
    """All five, in the order of a page."""
    return [_accuracy(run), _size(run), _speed(run), _sparse(run), _parity(run)]


def main_engine(run: Run) -> Engine | None:
    """The compressed engine that the summary's numbers are about: the first one of ONNX Runtime with a plan."""
    engines = [engine for engine in run.engines if engine.passport and engine.passport.data.get("plan")]
    exact = [engine for engine in engines if engine.name in ("ort-cpu-int8", "ort-cpu-sparse")]
    return next(iter([*exact, *engines]), None)


def dense_value(run: Run) -> Figure | None:
    """The dense model's metric."""
    return run.figure("dense") or (run.dense.at("value") if run.dense else None)


def compressed_value(run: Run) -> Figure | None:
    """The compressed engine's metric, or the checkpoint's where no engine was compared."""
    engine = main_engine(run)
    measured = engine.parity.at("engine_value") if engine and engine.parity else None
    return run.figure("compressed") or measured or (run.compressed.at("value") if run.compressed else None)


def metric(run: Run) -> str:
    """The metric's name."""
    engine = main_engine(run)
    sources = (run.dense, run.compressed, engine.parity if engine else None)
    found = run.figure("metric") or next((source.at("metric") for source in sources if source is not None), None)
    return str(found.value) if found else "metric"


def _accuracy(run: Run) -> Verdict:
    title, name = "Accuracy kept", metric(run)
    dense, compressed = dense_value(run), compressed_value(run)
    if dense is None or compressed is None:
        return Verdict(
            "accuracy", title, ABSENT, "not measured", note="The dense or the compressed model is not there yet."
        )
    rows = [Row("dense", (dense.shown("score"),)), Row("compressed", (compressed.shown("score"),))]
    low, high = run.figure("difference_interval", 0), run.figure("difference_interval", 1)
    samples = run.figure("dev_samples") or (run.dense.at("dev_samples") if run.dense else None)
    on = (" on ", samples.shown("general"), " held-out samples") if samples else ()
    lead: tuple[Piece, ...] = (compressed.shown("score"), f" {name}, dense ", dense.shown("score"))
    if low is None or high is None or not _numbers(low, high):
        return Verdict(
            "accuracy", title, OPEN, "no interval", tuple(rows), "Without a paired interval nothing is claimed.", lead
        )
    rows.append(Row("difference, 95 % paired", (low.shown("signed"), " to ", high.shown("signed"))))
    if on:
        rows.append(Row("measured", on))
    if high.value < 0:
        state, word, note = BAD, "worse than dense", "The whole interval lies below 0."
    elif low.value > 0:
        state, word, note = GOOD, "better than dense", "The whole interval lies above 0."
    else:
        state, word = OPEN, "not told apart"
        note = "The interval holds 0: these samples cannot tell the two models apart. That is not proof that they are equal."
    return Verdict("accuracy", title, state, word, tuple(rows), note, lead)


def compression(run: Run, counting: str) -> Figure | None:
    """1 - compressed/FP32 of the planned matrices by a counting."""
    if found := run.figure("compression", counting):
        return found
    if run.plan is not None:
        return Figure(run.plan.compression(counting), "checkpoint/nxm_plan.json")
    engine = main_engine(run)
    return engine.passport.at("plan", "compression", counting) if engine and engine.passport else None


def _size(run: Run) -> Verdict:
    title = "Size"
    hw = compression(run, "hw")
    packed, values = compression(run, "packed"), compression(run, "values")
    if hw is None or packed is None or values is None:
        return Verdict("size", title, ABSENT, "no plan", note="Nothing has been compressed in this run yet.")
    rows = [
        Row("stored as tensor cores read 2:4", (hw.shown("share"), " saved")),
        Row("smallest lossless file", (packed.shown("share"), " saved")),
        Row("kept values alone, as papers count", (values.shown("share"), " saved")),
    ]
    if run.plan is not None:
        for label, sparse in (
            ("matrices in an INT8 engine, dense", False),
            ("matrices in an INT8 engine, 2:4 kernels", True),
        ):
            size = Figure(run.plan.engine_bytes(sparse=sparse), "checkpoint/nxm_plan.json")
            rows.append(Row(label, (size.shown("megabytes"), " MB")))
    if (engine := main_engine(run)) and engine.bytes:
        rows.append(Row(f"engine file {engine.name}, all of it", (engine.bytes.shown("megabytes"), " MB")))
    note = "Shares are of the planned matrices against FP32; embeddings, biases and norms are not counted. An engine keeps "
    note += "every code in 8 bits, and zeros too, unless a 2:4 kernel runs."
    lead: tuple[Piece, ...] = (hw.shown("share"), " of the matrices' bits saved")
    return Verdict(
        "size", title, GOOD if hw.value > 0 else BAD, "smaller" if hw.value > 0 else "larger", tuple(rows), note, lead
    )


def ratios(run: Run, engine: str | None = None) -> list[Mapping[str, Figure]]:
    """The speed-ups of a run with their places, those of one `engine` or all."""
    sources = [(run.summary, ("speedup",))] if run.summary else [(bench, ("ratios",)) for bench in run.benches]
    found: list[Mapping[str, Figure]] = []
    for source, keys in sources:
        listed = source.at(*keys)
        for number in range(len(listed.value) if listed and isinstance(listed.value, list) else 0):
            fields = {
                "name": source.at(*keys, number, "name"),
                "reference": source.at(*keys, number, "reference"),
                "batch": source.at(*keys, number, "batch"),
                "sequence": source.at(*keys, number, "sequence"),
                "speedup": source.at(*keys, number, "speedup"),
                "low": source.at(*keys, number, "interval", 0),
                "high": source.at(*keys, number, "interval", 1),
            }
            row = {key: figure for key, figure in fields.items() if figure is not None}
            if len(row) == len(fields) and engine in (None, row["name"].value):
                found.append(row)
    return found


def _speed(run: Run) -> Verdict:
    title, engine = "Speed", main_engine(run)
    found = ratios(run, engine.name if engine else None)
    if engine is None or not found or not all(_numbers(row["low"], row["high"], row["speedup"]) for row in found):
        return Verdict("speed", title, ABSENT, "not timed", note="No engine of this run was timed against another.")
    rows = tuple(
        Row(
            f"batch {row['batch'].value} x {row['sequence'].value} tokens",
            (row["speedup"].shown("ratio"), "x (", row["low"].shown("ratio"), " to ", row["high"].shown("ratio"), ")"),
        )
        for row in found
    )
    if all(row["low"].value > 1 for row in found):
        state, word = GOOD, "faster"
    elif all(row["high"].value < 1 for row in found):
        state, word = BAD, "slower"
    elif any(row["low"].value > 1 for row in found):
        state, word = OPEN, "not everywhere"
    else:
        state, word = OPEN, "not told apart"
    slowest = min(found, key=lambda row: float(row["speedup"].value))
    shape = f"{slowest['batch'].value}x{slowest['sequence'].value}"
    lead = (
        slowest["speedup"].shown("ratio"),
        f"x at {shape}" + (f", the least of {len(found)} shapes" if found[1:] else ""),
    )
    device = engine.passport.data.get("device", {}).get("name") if engine.passport else None
    note = f"{engine.name} against {slowest['reference'].value}, 95 % intervals of paired rounds" + (
        f", on {device}." if device else "."
    )
    return Verdict("speed", title, state, word, rows, note, lead)


def _sparse(run: Run) -> Verdict:
    title = "Sparse"
    planned = [m for m in run.matrices if m.spec.pattern is not None]
    if run.plan is None:
        return Verdict("sparse", title, ABSENT, "no plan", note="Nothing has been compressed in this run yet.")
    if not planned:
        return Verdict("sparse", title, OPEN, "not planned", note="The plan gives no matrix a pattern.")
    stored = [m for m in planned if m.pattern and not m.problems and all(m.pattern.values())]
    checked = [m for m in planned if m.pattern]
    rows = [
        Row("planned N:M", (f"{len(planned)} of {len(run.matrices)} matrices",)),
        Row(
            "found in the stored numbers",
            (f"{len(stored)} of {len(planned)}" if checked else "no graph was checked",),
        ),
    ]
    engines = [engine for engine in run.engines if engine.is_trt]
    proved = False
    for engine in engines:
        wanted = [row for row in engine.truth if row.get("planned_sparse")]
        run_sparse = [row for row in wanted if row.get("chosen") is True]
        unknown = [row for row in wanted if row.get("chosen") is None]
        proved = proved or bool(run_sparse)
        integer, products = (_option(run, engine, key) for key in ("integer_products", "planned_products"))
        if integer and products:
            pieces = (integer.shown("general"), " of ", products.shown("general"), " planned")
            rows.append(Row(f"INT8 matrix products, {engine.name}", pieces))
        text = f"{len(run_sparse)} of {len(wanted)} proved" if wanted else "unknown"
        rows.append(
            Row(f"runs on sparse kernels, {engine.name}", (text + (f", {len(unknown)} unknown" if unknown else ""),))
        )
    if any(e.passport and e.passport.data.get("backend") == "ort" for e in run.engines):
        rows.append(Row("runs on sparse kernels, ONNX Runtime", ("none: it has no such kernels",)))
    if checked and len(stored) < len(checked):
        return Verdict(
            "sparse", title, BAD, "pattern broken", tuple(rows), "A stored matrix breaks the pattern of its plan."
        )
    stored_word = (f"{len(stored)} of {len(planned)} stored N:M",)
    if proved:
        return Verdict("sparse", title, GOOD, "stored and run", tuple(rows), "", stored_word)
    note = "Whether a 2:4 kernel runs is only known on the GPU. Until an engine proves it, it is called unknown."
    return Verdict("sparse", title, OPEN, "stored; running unknown", tuple(rows), note, stored_word)


def _option(run: Run, engine: Engine, key: str) -> Figure | None:
    """A fact of a TensorRT build: the summary has those of the RTX engine, every passport its own."""
    summed = run.figure("trt_rtx", key) if engine.name.startswith("trt_rtx") else None
    return summed or (engine.passport.at("options", key) if engine.passport else None)


def _parity(run: Run) -> Verdict:
    title = "Parity"
    compared = [engine for engine in run.engines if engine.parity is not None]
    if not compared:
        return Verdict("parity", title, ABSENT, "not compared", note="No engine was compared with its checkpoint.")
    failed = [
        engine for engine in compared if engine.parts_in or not (engine.parity and engine.parity.data["passed"] is True)
    ]
    rows = []
    for engine in compared:
        agreement = run.figure("parity", engine.name, "agreement") or (
            worst_output(engine.parity, "agreement", least=True) if engine.parity else None
        )
        word = "FAIL" if engine in failed else "pass"
        pieces: tuple[Piece, ...] = (word,)
        if agreement and agreement.value is not None:  # of scores and embeddings there is no argmax
            pieces = (word, ", ", agreement.shown("share"), " equal argmax")
        if engine.parts_in:
            pieces = (*pieces, f"; parts from the checkpoint in {engine.parts_in}")
        rows.append(Row(engine.name, pieces))
    others = [engine.name for engine in run.engines if engine.parity is None]
    note = "Each engine against its own checkpoint in PyTorch, on the same samples, with a measured tolerance."
    if others:
        note += f" Not compared: {', '.join(others)}."
    lead = (f"{len(compared) - len(failed)} of {len(compared)} engines compared pass",)
    if failed:
        return Verdict("parity", title, BAD, "failed", tuple(rows), note, lead)
    return Verdict("parity", title, GOOD, "passed", tuple(rows), note, lead)


def _numbers(*figures: Figure) -> bool:
    return all(isinstance(figure.value, (int, float)) for figure in figures)
