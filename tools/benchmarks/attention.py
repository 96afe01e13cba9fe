"""What ONNX Runtime's fused attention saves the families whose queries and keys are rotated: times of the same graph
with it and without, paired.

    python -m tools.benchmarks.attention            measure, write results/performance/attention.json and the document
    python -m tools.benchmarks.attention --render   the section of docs/performance.md, from the record

Weights are random, 2:4 and INT8. Both graphs run on integer products and differ in attention alone; every round times
each once in an order that turns. Tokens are random, without padding: kernels take the same time for either.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from engines.benchmark.latency import interleaved
from engines.ort.backend import LEFT_OUT, open_session, unsigned_activations
from engines.ort.graph_rewrites import fused_attention, integer_products, plain_attention
from tools.benchmarks.measuring import (
    DOCUMENT,
    RECORDS,
    Circumstances,
    Ratio,
    bench_parser,
    circumstances,
    load_record,
    paired_ratio,
    save_record,
    where_and_when,
)
from tools.benchmarks.scaling import VOCABULARY, write_random
from tools.rendering import render, write_section

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOOL = "tools/benchmarks/attention.py"
FILE = RECORDS / "attention.json"
SHAPES = ((1, 128), (8, 128), (1, 1024))  # (batch, sequence)
ROUNDS = 30
FORMS = ("plain", "fused")


@dataclass(frozen=True)
class _Model:
    """A model that is timed: its name here, family, sizes, and what else its configuration says."""

    name: str
    family: str
    hidden: int
    wide: int
    layers: int
    heads: int
    options: Mapping[str, object] = field(default_factory=dict)


_MODERN = {
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    **{f"{token}_token_id": 1 for token in ("bos", "eos", "cls", "sep")},
}
MODELS = (
    _Model("ModernBERT-base, 4 of 22 blocks", "modernbert", 768, 1152, 4, 12, _MODERN),
    _Model("Nomic at MiniLM-L6's sizes", "nomic_bert", 384, 1536, 6, 12),
)
SMOKE_MODELS = (_Model("small", "modernbert", 64, 128, 4, 4, _MODERN),)


class Timed(TypedDict):
    """How long fused attention takes over the plain one, and the medians of both in milliseconds."""

    batch: int
    sequence: int
    plain_ms: float
    fused_ms: float
    ratio: Ratio


class Row(TypedDict):
    """A model: how many attentions were fused and how many were not, the largest difference of the outputs of the two
    graphs over the shapes, beside the largest output, and times."""

    model: str
    fused: int
    plain: int
    difference: float
    largest: float
    times: list[Timed]


class Record(Circumstances):
    """The file ``attention.json``."""

    schema: str
    rounds: int
    rows: list[Row]


def measure(models: Sequence[_Model], shapes: Sequence[tuple[int, int]], rounds: int) -> Record:
    """The record."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [_measured(model, shapes, rounds, Path(scratch) / str(at)) for at, model in enumerate(models)]
    return {
        "schema": "nxm-bench-attention/1",
        **circumstances(len(os.sched_getaffinity(0)), ("onnxruntime", "onnx", "torch", "transformers")),
        "rounds": rounds,
        "rows": rows,
    }


def _measured(model: _Model, shapes: Sequence[tuple[int, int]], rounds: int, scratch: Path) -> Row:
    from nxm_export.graph.exporter import export
    from nxm_export.graph.reading.graph_weights import load_graph, save_graph

    write_random(scratch / "checkpoint", _config(model), weights="2:4+W8")
    export(scratch / "checkpoint", scratch / "graph")
    counts: dict[str, tuple[int, int]] = {}
    for form in FORMS:
        graph = load_graph(scratch / "graph/model.onnx")
        unsigned_activations(graph)
        integer_products(graph)
        fused = fused_attention(graph).fused if form == "fused" else 0
        counts[form] = fused, plain_attention(graph.graph)
        save_graph(graph, scratch / f"{form}.onnx")
    sessions = {form: open_session(scratch / f"{form}.onnx", None, LEFT_OUT) for form in FORMS}
    names = [value.name for value in sessions["plain"].get_inputs()]
    difference = largest = 0.0
    times: list[Timed] = []
    for batch, sequence in shapes:
        feeds = _feeds(names, batch, sequence)
        outputs = {form: sessions[form].run(None, feeds)[0] for form in FORMS}
        difference = max(difference, float(np.abs(outputs["fused"] - outputs["plain"]).max()))
        largest = max(largest, float(np.abs(outputs["plain"]).max()))
        taken = interleaved({form: _timer(sessions[form].run, feeds) for form in FORMS}, rounds, settle=True)
        times.append(
            {
                "batch": batch,
                "sequence": sequence,
                "plain_ms": float(np.median(taken["plain"])),
                "fused_ms": float(np.median(taken["fused"])),
                "ratio": paired_ratio(taken["fused"], taken["plain"]),
            }
        )
    fused, left = counts["fused"]
    return {
        "model": model.name,
        "fused": fused,
        "plain": left,
        "difference": difference,
        "largest": largest,
        "times": times,
    }


def _config(model: _Model) -> PreTrainedConfig:
    import transformers

    return transformers.AutoConfig.for_model(
        model.family,
        vocab_size=VOCABULARY,
        hidden_size=model.hidden,
        intermediate_size=model.wide,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        pad_token_id=0,
        **model.options,
    )


def _feeds(names: Sequence[str], batch: int, sequence: int) -> dict[str, np.ndarray]:
    feeds = {name: np.zeros((batch, sequence), np.int64) for name in names}
    feeds["input_ids"] = np.random.default_rng(0).integers(4, 1000, (batch, sequence))
    feeds["attention_mask"] = np.ones((batch, sequence), np.int64)
    return feeds


def _timer(run: Callable[[None, dict[str, np.ndarray]], object], feeds: dict[str, np.ndarray]) -> Callable[[], float]:
    def timed() -> float:
        began = time.perf_counter()
        run(None, feeds)
        return (time.perf_counter() - began) * 1e3

    return timed


def section(record: Record) -> str:
    """The section of a record; the text stands in ``attention.md.j2``."""
    rows = record["rows"]
    return render(
        "benchmarks/attention.md.j2",
        where_and_when=where_and_when(record),
        rounds=record["rounds"],
        shapes=[f"{entry['batch']}x{entry['sequence']}" for entry in rows[0]["times"]],
        rows=[_cells(row) for row in rows],
    )


def _cells(row: Row) -> list[str]:
    cells = [row["model"], f"{row['fused']} of {row['fused'] + row['plain']}"]
    for entry in row["times"]:
        low, high = entry["ratio"]["interval"]
        cells.append(f"{entry['ratio']['ratio']:.2f} ({low:.2f} to {high:.2f}) of {entry['plain_ms']:.1f} ms")
    return [*cells, f"{row['difference']:.2g} of {row['largest']:.2g}"]


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = bench_parser(__doc__).parse_args(arguments)
    if chosen.smoke:
        print(section(measure(SMOKE_MODELS, SHAPES[:1], 3)))
        return
    record = load_record(FILE, Record) if chosen.render else measure(MODELS, SHAPES, ROUNDS)
    save_record(FILE, record)
    write_section(DOCUMENT, TOOL, section(record))


if __name__ == "__main__":
    main()
