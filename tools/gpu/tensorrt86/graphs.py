"""Checkpoints and graphs for TensorRT 8.6, and PyTorch's outputs to compare with; made by the machine's own Python.

    python3 -m tools.gpu.tensorrt86.graphs WORK minilm,attention,tanh,conv1x1 ...

Each variant is a folder ``WORK/onnx/VARIANT`` with ``int8/model.onnx``, ``float/model.onnx`` and ``reference.npz``; the
file ``ready`` in it says that it is complete.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from engines.reference import pytorch
from nxm_export.graph.exporter import export
from tools.gpu.evidence import Variant, one_shot


def mend_shapes(model: onnx.ModelProto) -> int:
    """Write every ``Shape`` with `start` or `end` as Shape and Gather, in place; returns how many there were.

    The ONNX parser of TensorRT 8 and 9 ignores both attributes (it reads them since 10.0), so that a graph of ours with
    1x1 convolutions is refused or misread. ONNX Runtime does not show it. Of no effect once the exporter writes none
    for ``trt8``.
    """
    graph = model.graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim) for value in [*graph.input, *graph.value_info, *graph.output]
    }
    count = 0
    for position, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "Shape" or not node.attribute:
            continue
        given = {attribute.name: attribute.i for attribute in node.attribute}
        rank = ranks.get(node.input[0])
        start, end = given.get("start", 0), given.get("end", rank)
        if rank is None or end is None or start < 0 or end < 0:
            raise ValueError(f"{node.name}: the rank of {node.input[0]} is not known")
        output, axes = node.output[0], np.arange(start, min(end, rank), dtype=np.int64)
        del node.attribute[:]
        node.output[0] = f"{output}_all"
        graph.initializer.append(numpy_helper.from_array(axes, f"{output}_axes"))
        gather = helper.make_node("Gather", [f"{output}_all", f"{output}_axes"], [output], f"{node.name}_pick", axis=0)
        graph.node.insert(position + 1, gather)
        count += 1
    return count


def feeds(samples: int = 16, length: int = 32) -> dict[str, npt.NDArray[np.int64]]:
    """Random token ids; every other sample is padded from its middle on."""
    ids = np.random.default_rng(0).integers(5, 30522, size=(samples, length))
    mask = np.ones_like(ids)
    mask[::2, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def make(variant: Variant, work: Path) -> str:
    """Checkpoint, graphs and reference of one variant; returns a line about them."""
    began = time.monotonic()
    checkpoint = one_shot(variant, work / "checkpoints")
    out = work / "onnx" / variant.name
    mended = 0
    for name, placement in (("int8", variant.placement), ("float", "float")):
        export(checkpoint, out / name, target="trt8", lowering=variant.lowering, placement=placement)
        file = out / name / "model.onnx"
        model = onnx.load(file)
        mended += mend_shapes(model)
        onnx.save(model, file)
    given = feeds()
    with pytorch.load(checkpoint, task="classification") as engine:
        outputs = {f"out_{name}": value for name, value in engine.run(given).items()}
    np.savez(out / "reference.npz", allow_pickle=False, **given, **outputs)
    (out / "ready").touch()
    return f"{variant.name}: {time.monotonic() - began:.1f} s, {mended} Shape nodes mended"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.gpu.tensorrt86.graphs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("variants", nargs="+", help="model,placement,gelu,lowering")
    options = parser.parse_args(arguments)
    for text in options.variants:
        print(make(Variant(*text.split(",")), options.work), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
