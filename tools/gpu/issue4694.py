"""NVIDIA/TensorRT issue 4694 as two presets: 2:4 INT8 products that write float, against ones with a quantizer behind.

    python -m tools.gpu.issue4694 --model tiny                        here: TensorRT-RTX builds without a GPU
    python -m tools.gpu.issue4694 --backend trt --model bert-base     on a GPU with TensorRT: kernels are chosen

The issue: weights that are 2:4, a builder that says ``HasSparseWeights``, and dense kernels, where inputs are
INT8 and the output is float. ``float-out`` is placement ``inputs``, ``int8-out`` is placement ``inputs-outputs``: one
checkpoint of random weights (`tools.gpu.random_checkpoint`), exported twice. Prints one line for every form in which
products were built: how many, types in and out, kernel, and whether it is proven sparse; writes it to ``--out`` too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.base import BACKENDS, BuildOptions, backend
from engines.sparsity.build_evidence import LayerInfo, product_layers, read_evidence
from engines.sparsity.sparsity_report import SparsityReport
from nxm_export.errors import NxmError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.inspection import inspect_engine
from nxm_export.storage.atomic import atomic_dir, write_atomic
from tools.gpu.arguments import names_of, shape
from tools.gpu.evidence import MODELS, profiles_of
from tools.gpu.random_checkpoint import write_checkpoint

PRESETS = {"float-out": "inputs", "int8-out": "inputs-outputs"}  # name -> placement of quantizers
BUILDERS = ("trt_rtx", "trt")
HEADER = "| preset | products | inputs | output | kernel | runs sparse |\n|---|---:|---|---|---|---|"


@dataclass(frozen=True)
class Form:
    """A way in which products were built. `outcome` is ``sparse``, or the reason why that is not proven."""

    inputs: str
    output: str
    kernel: str
    outcome: str


def forms(report: SparsityReport, layers: Sequence[LayerInfo]) -> Counter[Form]:
    """How often every form stands among the matrices that are planned sparse."""
    counted: Counter[Form] = Counter()
    for weight in report.weights:
        if not weight.planned_sparse:
            continue
        layer = next(iter(product_layers(layers, weight.node)), None)
        inputs, output = ("?", "?") if layer is None else (_types(layer.inputs), _types(layer.outputs))
        kernel = weight.kernel or (layer.kernel if layer is not None else "") or "?"
        counted[Form(inputs, output, kernel, weight.outcome)] += 1
    return counted


def table(built: Mapping[str, Counter[Form]]) -> str:
    """The Markdown table of both presets."""
    rows = [
        f"| {preset} | {count} | {form.inputs} | {form.output} | {form.kernel} | {form.outcome} |"
        for preset, counted in built.items()
        for form, count in counted.most_common()
    ]
    return "\n".join([HEADER, *rows])


def build(preset: str, options: argparse.Namespace) -> Counter[Form]:
    """Build one preset, where it is not there from before, and count its forms."""
    model = f"{options.model}-{options.layers or 'all'}"
    work: Path = options.work / f"{model}-{options.backend}-{'x'.join(map(str, options.shape))}-level-{options.level}"
    checkpoint = write_checkpoint(options.model, options.work / "checkpoints" / model, options.layers)
    engine = work / preset
    if not engine.is_dir():
        with atomic_dir(work / f"{preset}-graph", replace_any=True) as scratch:
            graph = export(checkpoint, scratch / "graph", target="trt", placement=PRESETS[preset])
            with atomic_dir(engine) as made:
                settings = BuildOptions(profiles=profiles_of([options.shape]), level=options.level)
                backend(options.backend).build(graph.path, made, settings)
    report = inspect_engine(engine).sparsity
    assert report is not None, "both builders give one"
    return forms(report, read_evidence(engine).layers)


def _types(found: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(found)) or "?"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=[name for name in BACKENDS if name in BUILDERS], default="trt_rtx")
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--layers", type=int, help="fewer encoder layers than the model has")
    parser.add_argument("--presets", type=names_of(PRESETS), default=",".join(PRESETS), help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--shape", type=shape, help="batch x sequence [32x128, or as long as the model takes]")
    parser.add_argument("--level", type=int, default=4, help="builder optimization level")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    parser.add_argument("--work", type=Path, default=Path("runs/issue4694"), help="engines; kept between calls")
    options = parser.parse_args(arguments)
    options.shape = options.shape or (32, min(128, MODELS[options.model][3]))
    built: dict[str, Counter[Form]] = {}
    for preset in options.presets:
        try:
            built[preset] = build(preset, options)
        except NxmError as error:
            print(f"tools.gpu.issue4694: {preset}: {error}", file=sys.stderr)
            return 1
    print(table(built))
    if options.out is not None:
        write_atomic(options.out, f"{table(built)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
