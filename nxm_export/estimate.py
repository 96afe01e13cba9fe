"""``nxm run --dry-run``: what would be done, roughly how long, and how large the results are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxm_export.data import load_raw
from nxm_export.plan import COUNTINGS

if TYPE_CHECKING:
    from nxm_export.pipeline import Request

# Work of one training step in units of a plain forward and backward pass: the dense model once; the compressed model with
# fake quantization, and a forward pass of the teacher.
_COMPRESS_FACTOR = 1.9
_WORDS_TO_TOKENS = 1.35  # of English under a BERT vocabulary


def estimate(request: Request) -> dict[str, Any]:
    """Steps, seconds and bytes by stage. Data is read and the plan made, so that their mistakes show here; nothing is
    written. Seconds come from a matrix product timed on this machine and are good to a factor of two."""
    from compressors.models import resolve
    from nxm_export.families import task_named

    source = resolve(request.model, request.revision)
    plan = source.family.uniform_plan(
        source.config,
        request.spec,
        placement=request.placement,
        keep_dense=request.keep_dense,
        residual=request.residual,
    )
    train, dev = load_raw(request.train, "train", request.columns), load_raw(request.dev, "dev", request.columns)
    settings, count = request.settings, min(len(train.texts), request.train_limit or len(train.texts))
    words = sum(len(text.split()) for text in train.texts[:2000]) / min(2000, len(train.texts))
    tokens = min(settings.max_length or 512, words * _WORDS_TO_TOKENS + 2)
    elements = sum(out * in_ for out, in_ in plan.shapes.values())
    speed = _flops()
    step = settings.batch_size * tokens * elements * 6 / speed
    fits = source.head_fits(task_named(request.task))
    dense_steps = 0 if fits else settings.dense_steps or round(settings.dense_epochs * count / settings.batch_size)
    steps = settings.steps or round(settings.epochs * count / settings.batch_size)
    weights = _weight_bytes(source.path)
    saved = sum(
        plan.shapes[name][0] * plan.shapes[name][1] * 3 for name, spec in plan.weights.items() if spec.weight_bits
    )
    return {
        "training samples": count,
        "held-out samples": len(dev.texts),
        "plan": json.dumps(plan.pattern_counts),
        "compression": ", ".join(f"{counting} {plan.compression(counting):.2%}" for counting in COUNTINGS),
        "dense fine-tuning": f"{dense_steps} steps, about {_minutes(dense_steps * step)}",
        "compression training": f"{steps} steps, about {_minutes(steps * step * _COMPRESS_FACTOR)}",
        "export, build, compare, time": "about 1 to 3 minutes",
        "dense model and checkpoint": f"{2 * weights / 1e6:.0f} MB",
        "INT8 graph": f"about {(weights - saved) / 1e6:.0f} MB (FP32 {weights / 1e6:.0f} MB)",
    }


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _flops() -> float:
    """Floating-point operations a second of a matrix product in the training precision, over a fifth of a second."""
    import torch

    from compressors.train import wants_bf16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(768, 768, device=device, dtype=torch.bfloat16 if wants_bf16("auto") else torch.float32)
    a @ a
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        float((a @ a)[0, 0])
        products += 1
    # Small layers, attention, norms and the optimizer keep training at about a quarter of a large product's speed.
    return 0.25 * products * 2 * 768**3 / (time.perf_counter() - began)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
