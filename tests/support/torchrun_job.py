"""Compress and search a tiny model, and say what every process holds: run by `torchrun`, and in one process to compare.

torchrun --nproc_per_node 2 -m tests.support.torchrun_job DESK OUT
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from compressors import distributed
from compressors.pruning.admm import Admm, DualUpdate
from compressors.quantization.prepare_bake import bake
from compressors.search.plan_search import search
from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from compressors.training.admm_schedule import AdmmCallback
from compressors.training.compress import compress
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics

TRAINING = Settings(
    recipe="nxm",
    steps=16,
    batch_size=16,
    learning_rate=1e-4,
    dual_updates=2,
    calibration_samples=64,
    precision="fp32",
    threads=1,
)
SEARCH = SearchSettings(samples=24, held_out=24, swaps=6, compression=0.87, finalists=2, halving=(2,))


def job(desk: Path, out: Path) -> dict[str, object]:
    """Search, then compress under the plan that it gives, into `out`; returns hashes of ADMM's state and of the trained
    weights."""
    states: list[str] = []
    update, before_step = Admm.dual_update, AdmmCallback.on_pre_optimizer_step

    def watched_update(admm: Admm) -> DualUpdate:
        done = update(admm)
        states.append(_hash(admm))
        return done

    def watched_bake(student: nn.Module, plan: CompressionPlan) -> dict[str, np.ndarray]:
        states.append(_hash(student))
        return bake(student, plan)

    def watched_step(
        self: AdmmCallback, args: TrainingArguments, state: TrainerState, control: TrainerControl, **extra: Any
    ) -> None:
        file = out / f"gradients-{distributed.rank()}.pt"
        if not file.exists():  # of the first step, of the whole batch, clipped
            torch.save(
                {name: p.grad.clone() for name, p in extra["model"].named_parameters() if p.grad is not None}, file
            )
        before_step(self, args, state, control, **extra)

    train, dev = str(desk / "train.tsv"), str(desk / "dev.tsv")
    search(desk / "dense", task="classification", train=train, out=out / "searched", settings=SEARCH, training=TRAINING)
    plan = CompressionPlan.load(out / "searched" / "plan.json")

    def compressed(name: str, settings: Settings) -> CompressionMetrics:
        return compress(
            desk / "dense", task="classification", train=train, dev=dev, plan=plan, out=out / name, settings=settings
        )

    with (
        patch.object(Admm, "dual_update", watched_update),
        patch("compressors.training.compress.bake", watched_bake),
        patch.object(AdmmCallback, "on_pre_optimizer_step", watched_step),
    ):
        metrics = compressed("checkpoint", TRAINING)
        # In this mode the forward pass leaves weights in float, and their quantizers' scales without gradient.
        compressed("joint", replace(TRAINING, steps=4, admm="joint"))
        # Solutions that the processes share out.
        compressed("obs", replace(TRAINING, steps=2, recipe="obs"))
        compressed("admm", replace(TRAINING, steps=0, recipe="admm"))
    return {"states": states, "metrics": metrics.to_dict()}


def _dawdle(out: Path) -> None:
    """Make this process slow at every other file it opens and directory it lists in `out`: what others then do without
    waiting for it, such as clearing up, shows.
    """
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in {"open", "os.scandir", "os.listdir"} and str(out) in str(arguments[0]):
            seen += 1
            if seen % 2:
                time.sleep(0.02)

    sys.addaudithook(hook)


def _hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    distributed.start()
    assert torch.distributed.get_world_size() == 2
    assert torch.distributed.get_backend() == "gloo"
    desk, out = map(Path, sys.argv[1:])
    if distributed.rank():
        _dawdle(out)
    every = distributed.gathered([job(desk, out)])
    if not distributed.rank():
        (out / "processes.json").write_text(json.dumps(every))
    torch.distributed.destroy_process_group()
