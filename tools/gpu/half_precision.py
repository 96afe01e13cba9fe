"""Models as FP16 for the way, half as large; what is measured there is the rounded model, and called so."""

from __future__ import annotations

import shutil
from pathlib import Path

MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = "model.safetensors"


def as_half(model: Path, out: Path) -> None:
    """Write the model directory `model` to the new directory `out`, its weights in FP16."""
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    for name in MODEL:
        shutil.copy(model / name, out / name)
    state = load_file(model / WEIGHTS)
    halves = {name: value.half().contiguous() if value.is_floating_point() else value for name, value in state.items()}
    save_file(halves, out / WEIGHTS, metadata={"format": "pt"})


def as_float(carried: Path, out: Path) -> None:
    """Write a carried model to the new directory `out`, its weights in FP32 again."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(carried, out)
    weights = {
        name: value.float().contiguous() if value.is_floating_point() else value
        for name, value in load_file(out / WEIGHTS).items()
    }
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
