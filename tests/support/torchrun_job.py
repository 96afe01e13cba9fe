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

import torch

from compressors import distributed
from compressors.pruning.admm import Admm
from compressors.search.plan_search import search
from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from compressors.training import admm_schedule
from compressors.training import compress as compressing
from nxm_export.contract.plan import CompressionPlan

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


def job(desk: Path, out: Path) -> dict[str, Any]:
    """Search, then compress under the plan found, into `out`; returns hashes of ADMM's state and of the trained weights."""
    states: list[str] = []
    update, bake, before_step = Admm.dual_update, compressing.bake, admm_schedule.AdmmCallback.on_pre_optimizer_step

    def watched_update(admm: Admm) -> Any:
        found = update(admm)
        states.append(_hash(admm))
        return found

    def watched_bake(student: Any, plan: CompressionPlan) -> Any:
        states.append(_hash(student))
        return bake(student, plan)

    def watched_step(self: Any, arguments: Any, state: Any, control: Any, **extra: Any) -> None:
        file = out / f"gradients-{distributed.rank()}.pt"
        if not file.exists():  # of the first step, of the whole batch, clipped
            torch.save(
                {name: p.grad.clone() for name, p in extra["model"].named_parameters() if p.grad is not None}, file
            )
        before_step(self, arguments, state, control, **extra)

    data = {"task": "classification", "train": str(desk / "train.tsv")}
    search(desk / "dense", out=out / "found", settings=SEARCH, training=TRAINING, **data)  # type: ignore[arg-type]
    plan = CompressionPlan.load(out / "found" / "plan.json")
    Admm.dual_update, compressing.bake = watched_update, watched_bake  # type: ignore[method-assign]
    admm_schedule.AdmmCallback.on_pre_optimizer_step = watched_step  # type: ignore[method-assign]
    try:
        metrics = compressing.compress(
            desk / "dense", plan=plan, out=out / "checkpoint", dev=str(desk / "dev.tsv"), settings=TRAINING, **data
        )
        # In this mode the forward pass leaves weights in float, and their quantizer steps without gradient.
        joint = replace(TRAINING, steps=4, admm="joint")
        compressing.compress(
            desk / "dense", plan=plan, out=out / "joint", dev=str(desk / "dev.tsv"), settings=joint, **data
        )
        # Masks by second-order pruning, which every process does for itself.
        second_order = replace(TRAINING, steps=2, recipe="obs")
        compressing.compress(
            desk / "dense", plan=plan, out=out / "obs", dev=str(desk / "dev.tsv"), settings=second_order, **data
        )
    finally:
        Admm.dual_update, compressing.bake = update, bake  # type: ignore[method-assign]
        admm_schedule.AdmmCallback.on_pre_optimizer_step = before_step  # type: ignore[method-assign]
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
    distributed.finish()
