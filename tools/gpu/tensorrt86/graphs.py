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

from engines.reference import pytorch
from nxm_export.graph.exporter import export
from tools.gpu.evidence import Variant, one_shot


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
    for name, placement in (("int8", variant.placement), ("float", "float")):
        export(checkpoint, out / name, target="trt8", lowering=variant.lowering, placement=placement)
    given = feeds()
    with pytorch.load(checkpoint, task="classification") as engine:
        outputs = {f"out_{name}": value for name, value in engine.run(given).items()}
    np.savez(out / "reference.npz", allow_pickle=False, **given, **outputs)
    (out / "ready").touch()
    return f"{variant.name}: {time.monotonic() - began:.1f} s"


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
