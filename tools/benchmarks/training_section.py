"""The record of `tools.benchmarks.training`, and the section of docs/performance.md that is written from it."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from tools.benchmarks.measuring import (
    Circumstances,
    Marks,
    Median,
    Ratio,
    where_and_when,
)
from tools.rendering import render

ARMS = ("plain", "teacher", "admm without penalty", "admm", "qat", "qat with teacher")
MEMORY = ("plain", "teacher", "admm with teacher", "qat", "qat with teacher")
TITLES = {  # of arms and phases, in the document
    "plain": "plain fine-tuning",
    "teacher": "plain fine-tuning with a teacher (logits and hidden states)",
    "admm without penalty": "ADMM phase without penalty",
    "admm": "ADMM phase",
    "admm with teacher": "ADMM phase with the teacher",
    "qat": "masked QAT",
    "qat with teacher": "masked QAT with the teacher",
}
AIMS = {"admm": "<= 1.10", "qat": "<= 1.35", "qat with teacher": "<= 1.25"}
MEMORY_AIM = 1.4  # of a phase with a teacher, the whole process against that of plain fine-tuning


class RatioTo(Ratio):
    """A ratio to the time of another arm."""

    to: str


class StepRow(TypedDict):
    """Seconds of a step of every arm at one shape, and ratios by arm."""

    model: str
    batch: int
    sequence: int
    rounds: int
    seconds: dict[str, Median]
    ratios: dict[str, RatioTo]


class CompiledRow(TypedDict):
    """An arm under ``torch.compile``: why it failed, or its seconds and ratio."""

    model: str
    batch: int
    sequence: int
    arm: str
    failed: NotRequired[str]
    first_step: NotRequired[float]
    ratio: NotRequired[Ratio]


class DualRow(TypedDict):
    """Seconds of a dual update, or of the held-out loss, and the share of a phase that all of them are."""

    model: str
    mode: str
    seconds: Median
    updates: int
    steps: int
    share: float


class MemoryRatio(TypedDict):
    """Peak memory over that of plain fine-tuning: of the whole process, and of what training added."""

    process: float
    training: float


class MemoryRow(TypedDict):
    """Peak memory of every arm at one shape."""

    model: str
    batch: int
    sequence: int
    bytes: dict[str, Marks]
    ratios: dict[str, MemoryRatio]


class Record(Circumstances):
    """The file ``training.json``."""

    schema: str
    option: str
    precision: str
    steps: list[StepRow]
    compiled: list[CompiledRow]
    dual: list[DualRow]
    memory: list[MemoryRow]


def section(record: Record) -> str:
    """The section of a record; the text stands in ``training.md.j2``."""
    compiled = record["compiled"]
    phases = [kind for kind in MEMORY if kind.endswith("with teacher")]
    taught = [row["ratios"][kind]["process"] for row in record["memory"] for kind in phases]
    return render(
        "benchmarks/training.md.j2",
        where_and_when=where_and_when(record),
        option=record["option"],
        precision=record["precision"],
        steps=[_step_cells(row, kind) for row in record["steps"] for kind in ARMS],
        compiled=[_compiled_text(row) for row in compiled],
        compiled_shape=f"{compiled[0]['model']}, {compiled[0]['batch']} x {compiled[0]['sequence']}"
        if compiled
        else "",
        dual=[_dual_cells(row) for row in record["dual"]],
        memory=[_memory_cells(row, kind) for row in record["memory"] for kind in MEMORY],
        memory_aim=f"{MEMORY_AIM:.1f}",
        most=f"{max(taught):.2f}",
        least=f"{min(taught):.2f}",
        met="meets" if max(taught) <= MEMORY_AIM else "misses",
    )


def _step_cells(row: StepRow, kind: str) -> list[str]:
    shape, ratio = f"{row['model']}, {row['batch']} x {row['sequence']}", row["ratios"].get(kind)
    against = ["–", "–", ""] if ratio is None else [TITLES[ratio["to"]], _ratio(ratio), AIMS.get(kind, "")]
    return [shape, TITLES[kind], _ms(row["seconds"][kind]), *against]


def _compiled_text(row: CompiledRow) -> str:
    title = TITLES[row["arm"]]
    if "failed" in row:
        return f"{title} cannot be compiled ({row['failed']})"
    return f"{title} {_ratio(row['ratio'])} of the time, the first step after {row['first_step']:.0f} s"


def _dual_cells(row: DualRow) -> list[str]:
    updates = f"{row['updates']} in {row['steps']}"
    return [row["model"], f"`{row['mode']}`", _ms(row["seconds"]), updates, f"{row['share']:.2%}"]


def _memory_cells(row: MemoryRow, kind: str) -> list[str]:
    marks, ratio = row["bytes"][kind], row["ratios"][kind]
    return [
        f"{row['model']}, {row['batch']} x {row['sequence']}",
        TITLES[kind],
        f"{marks['peak'] / 1e6:.0f}",
        f"{ratio['process']:.2f}",
        f"{(marks['peak'] - marks['before']) / 1e6:.0f}",
        f"{ratio['training']:.2f}",
    ]


def _ms(median: Median) -> str:
    low, high = median["interval"]
    return f"{median['median'] * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})"


def _ratio(ratio: Ratio) -> str:
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.3f} ({low:.3f} to {high:.3f})"
