"""What bfloat16 autocast is worth in training on this CPU: steps in it over steps in float32.

    python -m tools.experiments.training_precision --threads 1

MiniLM-L6's sizes, random weights and token ids. Plain fine-tuning, and masked QAT with the teacher at 2:4+W4, on
batches of 32 texts. Every round takes one step with either precision, in turns; the ratio is the median over rounds,
with its 95 % bootstrap interval. Above 1, bfloat16 is slower.
"""

from __future__ import annotations

import argparse
import time

import torch

from compressors.freed_memory import keep_freed_memory
from compressors.training.trainer import wants_bf16
from tools.benchmarks.measuring import paired_ratio
from tools.benchmarks.training import MODELS, arm, batches

BATCH = 32
PRECISIONS = (False, True)  # whether in bfloat16


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="MiniLM-L6")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    print(f"{torch.cpu.get_capabilities()['cpu_name']}; --precision auto: {'bf16' if wants_bf16('auto') else 'fp32'}")
    for kind in ("plain", "qat with teacher"):
        for length in chosen.lengths:
            taken = seconds(kind, chosen.model, length, chosen.rounds)
            ratio = paired_ratio(taken[True], taken[False])
            print(
                f"{kind}, {BATCH} x {length}: bf16 over fp32 {ratio['ratio']:.2f} "
                f"({ratio['interval'][0]:.2f} to {ratio['interval'][1]:.2f})",
                flush=True,
            )


def seconds(kind: str, model: str, length: int, rounds: int) -> dict[bool, list[float]]:
    """Of every step of an arm of `tools.benchmarks.training`, by whether it ran in bfloat16."""
    arms = {bf16: arm(kind, model, bf16)[0] for bf16 in PRECISIONS}
    feed = batches(BATCH, length)
    taken: dict[bool, list[float]] = {bf16: [] for bf16 in PRECISIONS}
    for number in range(-2, rounds):  # two rounds warm up
        sample = next(feed)
        for bf16 in PRECISIONS if number % 2 else PRECISIONS[::-1]:
            began = time.perf_counter()
            arms[bf16].step(sample)
            if number >= 0:
                taken[bf16].append(time.perf_counter() - began)
    return taken


if __name__ == "__main__":
    main()
