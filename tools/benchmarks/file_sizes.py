"""Sizes of a base-size encoder's files, by how its weights and its word embeddings are stored.

    python -m tools.benchmarks.file_sizes            measure, write results/performance/file_sizes.json and the document
    python -m tools.benchmarks.file_sizes --render   the section of docs/performance.md, from the record

Weights are random, of the sizes of all-mpnet-base-v2: no size depends on their values. An engine of TensorRT-RTX is
built and not run; where it is not installed, its column is empty.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from engines.base import BuildOptions, backend
from nxm_export.contract.packed_checkpoint import pack
from nxm_export.errors import EngineUnavailable
from tools.benchmarks.measuring import DOCUMENT, RECORDS, bench_parser, load_record, save_record
from tools.benchmarks.scaling import write_random
from tools.provenance import versions
from tools.rendering import render, write_section

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOOL = "tools/benchmarks/file_sizes.py"
FILE = RECORDS / "file_sizes.json"


@dataclass(frozen=True)
class _Form:
    """What is stored how: the weights' pattern and bits, the word embeddings in the checkpoint, the integers of the
    weights in graphs."""

    weights: str
    embedding: str
    stored: str


FORMS = (
    _Form("2:4+W8", "float", "int8"),
    _Form("2:4+W8", "int8", "int8"),
    _Form("2:4+W4", "int8", "int4"),
    _Form("W4", "int8", "int4"),
)


class Row(TypedDict):
    """A form, and bytes of its files; `rtx_engine` is None where TensorRT-RTX is not installed."""

    weights: str
    embedding: str
    stored: str
    cpu_graph: int
    trt_graph: int
    rtx_engine: int | None
    packed: int


class Record(TypedDict):
    """The file ``file_sizes.json``."""

    schema: str
    model: str
    versions: dict[str, str]
    fp32: int
    rows: list[Row]


def measure(model: str, config: PreTrainedConfig, forms: Sequence[_Form]) -> Record:
    """The record of a model of this configuration."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [_measured(config, form, Path(scratch) / str(at)) for at, form in enumerate(forms)]
        checkpoint = Path(scratch) / "0" / "checkpoint" / "model.safetensors"  # baked weights are float32
        return {
            "schema": "nxm-bench-file-sizes/1",
            "model": model,
            "versions": versions(["onnx", *(["tensorrt-rtx-cu13"] if rows[0]["rtx_engine"] else []), "transformers"]),
            "fp32": checkpoint.stat().st_size,
            "rows": rows,
        }


def _measured(config: PreTrainedConfig, form: _Form, scratch: Path) -> Row:
    from nxm_export.graph.exporter import export

    checkpoint = scratch / "checkpoint"
    write_random(checkpoint, config, weights=form.weights, embedding=form.embedding)
    pack(checkpoint, scratch / "packed.nxm")
    for target in ("cpu", "trt"):
        # A pattern keeps all weights of a graph for TensorRT in INT8; asking for INT4 there is refused.
        stored = "int8" if target == "trt" and ":" in form.weights else form.stored
        export(checkpoint, scratch / target, target=target, weights_stored=stored)
    return {
        "weights": form.weights,
        "embedding": form.embedding,
        "stored": form.stored,
        "cpu_graph": _size(scratch / "cpu"),
        "trt_graph": _size(scratch / "trt"),
        "rtx_engine": _engine(scratch / "trt" / "model.onnx", scratch / "engine"),
        "packed": (scratch / "packed.nxm").stat().st_size,
    }


def _size(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.glob("model.onnx*"))


def _engine(graph: Path, out: Path) -> int | None:
    out.mkdir()
    try:
        backend("trt_rtx").build(graph, out, BuildOptions())
    except EngineUnavailable:
        return None
    return (out / "model.engine").stat().st_size


def section(record: Record) -> str:
    """The section of a record; the text stands in ``file_sizes.md.j2``."""
    return render(
        "benchmarks/file_sizes.md.j2",
        model=record["model"],
        made_with=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        fp32=f"{record['fp32'] / 1e6:.1f}",
        rows=[_cells(row) for row in record["rows"]],
    )


def _cells(row: Row) -> list[str]:
    table = "FP32, FP16 in `trt`" if row["embedding"] == "float" else "INT8, FP16 in `trt`"
    form = f"{row['weights']}, stored as {row['stored'].upper()}"
    sizes = (row["cpu_graph"], row["trt_graph"], row["rtx_engine"], row["packed"])
    return [form, table, *("–" if size is None else f"{size / 1e6:.1f}" for size in sizes)]


def main(arguments: Sequence[str] | None = None) -> None:
    import transformers

    chosen = bench_parser(__doc__).parse_args(arguments)
    if chosen.smoke:
        small = transformers.MPNetConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        print(section(measure("small", small, FORMS[-1:])))
        return
    whole = transformers.MPNetConfig(max_position_embeddings=514)
    record = load_record(FILE, Record) if chosen.render else measure("all-mpnet-base-v2", whole, FORMS)
    save_record(FILE, record)
    write_section(DOCUMENT, TOOL, section(record))


if __name__ == "__main__":
    main()
