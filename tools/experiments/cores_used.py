"""What a second thread is worth to the stages around training: seconds with one thread and with two.

    python -m tools.experiments.cores_used DENSE --train train.tsv --dev dev.tsv

One line per stage: calibration, the layer-wise solver of `admm` with what it reads (one block), and evaluation on dev;
before them large products of matrices, which are what this machine gives. The table of `nxm search` consists of the
last two stages. Processor time says nothing here: a thread that waits for another one spins.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from compressors.freed_memory import keep_freed_memory
from compressors.process_setup import prepare_process
from compressors.pruning.layer_inputs import by_block
from compressors.pruning.layerwise import ADMM, solve_layers
from compressors.quantization.fake_quant import quant_linears
from compressors.quantization.prepare_bake import calibrate
from compressors.settings import Settings
from compressors.training.phases import Job
from nxm_export.contract.plan import WeightSpec
from nxm_export.progress import silent
from tools.experiments.one_shot import Dense, parser


def main() -> None:
    """The command."""
    arguments = parser(__doc__, max_length=128).parse_args()
    prepare_process(None)
    keep_freed_memory()
    dense = Dense.of(arguments)
    plan = dense.source.family.uniform_plan(dense.source.config, WeightSpec.parse("2:4+W4"))
    with tempfile.TemporaryDirectory() as work:
        job = Job(dense.source, dense.data, plan, Settings(recipe="admm", steps=0), Path(work), silent)
        student, batches = job.prepared().eval(), job.calibration_batches()
    blocks = by_block(quant_linears(student), dense.source.family.blocks(dense.source.config))
    stages: dict[str, Callable[[], object]] = {
        "large products": _products,
        "calibration": lambda: calibrate(student, batches, None),
        "solver": lambda: solve_layers(student, blocks[:1], batches, ADMM),
        "evaluation": lambda: dense.predict(student),
    }
    for name, stage in stages.items():
        one, two = (_seconds(stage, threads) for threads in (1, 2))
        print(f"{name}: {one:.1f} s with one thread, {two:.1f} with two, {one / two:.2f} times as fast", flush=True)


def _products() -> None:
    square = torch.ones(2048, 2048)
    for _ in range(60):
        torch.mm(square, square)


def _seconds(stage: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    began = time.perf_counter()
    stage()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
