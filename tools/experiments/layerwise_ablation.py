"""What layer-wise starts are worth before any training: the model compressed one-shot, in every way that was tried.

    python -m tools.experiments.layerwise_ablation DENSE --train train.tsv --dev dev.tsv --options 2:4+W4,1:4+W4

One line per option and variant (`tools.experiments.layerwise_variants`): mean KL(dense || compressed) in nats and
agreement with the dense model over dev, mean error of the layers relative to their outputs (for the inputs that the
variant looks at), seconds; what several variants ask of the inputs counts for the first of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from compressors.freed_memory import keep_freed_memory
from compressors.process_setup import prepare_process
from compressors.pruning.layer_inputs import by_block
from compressors.quantization.fake_quant import quant_linears
from compressors.settings import Settings
from compressors.training.phases import Job
from nxm_export.contract.plan import WeightSpec
from nxm_export.progress import silent
from tools.experiments.layerwise_variants import VARIANTS, Inputs, Prepared
from tools.experiments.one_shot import Dense, parser


def main() -> None:
    arguments = _parser().parse_args()
    prepare_process(arguments.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as work:  # a job keeps what it has measured there, for this model and no other
        _compare(Dense.of(arguments), arguments, Path(work))


def _compare(dense: Dense, arguments: argparse.Namespace, work: Path) -> None:
    """Print the line of every option and variant."""
    in_float: list[str] | None = None
    inputs = Inputs()
    for option in arguments.options.split(","):
        for name in arguments.variants.split(";"):
            job = _job(dense, WeightSpec.parse(option), arguments, work)
            student = job.prepared().eval()
            in_float = _leave_in_float(job, student, in_float)
            blocks = by_block(quant_linears(student), dense.source.family.blocks(dense.source.config))
            prepared = Prepared(student, dense.model(), blocks, job.calibration_batches(), inputs)
            began = time.monotonic()
            errors = VARIANTS[name](prepared)
            seconds = time.monotonic() - began
            job._calibrate(student)
            logits = dense.predict(student)
            print(
                f"{option}, {name}: KL {dense.kl(logits):.4f}, agreement {100 * dense.agreement(logits):.1f}, "
                f"layer error {float(np.mean(errors)):.4f}, {seconds:.0f} s",
                flush=True,
            )


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, max_length=128)
    made.add_argument("--options", default="2:4+W4,1:4+W4")
    made.add_argument("--variants", default=";".join(VARIANTS), help="Separated by semicolons.")
    made.add_argument("--samples", type=int, default=512)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int)
    return made


def _job(dense: Dense, spec: WeightSpec, arguments: argparse.Namespace, work: Path) -> Job:
    settings = Settings(
        recipe="admm",
        steps=0,
        seed=arguments.seed,
        calibration_samples=arguments.samples,
        max_length=arguments.max_length,
    )
    plan = dense.source.family.uniform_plan(dense.source.config, spec)
    return Job(dense.source, dense.data, plan, settings, work, silent)


def _leave_in_float(job: Job, student: nn.Module, known: list[str] | None) -> list[str]:
    """Drop the output quantizers that cost too much; they are measured once."""
    if known is None:
        return list(job._leave_in_float(student))
    layers = quant_linears(student)
    for name in known:
        layers[name].output_quantizer = None
        layers[name].spec = replace(layers[name].spec, output_bits=None)
    return known


if __name__ == "__main__":
    main()
