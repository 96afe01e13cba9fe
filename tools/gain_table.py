"""The tables of docs/will-it-pay.md: what 2:4 can gain for well-known models, and the peaks that this follows from; and
what `nxm doctor` prints for one of them.

    python -m tools.gain_table --write

Arithmetic alone: the sizes of the models stand here, the peaks in ``engines/sparsity/gpu_figures.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from engines.sparsity.gain import gain_bound, gain_estimate
from engines.sparsity.gpu_figures import GpuFigures, all_figures, figures_of
from engines.sparsity.kernel_names import sparse_kernel_exists
from engines.sparsity.targets import sparsity_target, target_problems
from engines.sparsity.workload import Workload, encoder_workload
from nxm_export.contract.families import FAMILIES
from tools import ROOT
from tools.rendering import table, write_section

PAGE = ROOT / "docs/will-it-pay.md"
SECTION, ANSWER = "tools.gain_table", "tools.gain_table answer"
# Hidden size, FFN, layers, heads.
MODELS = {
    "BERT-base": (768, 3072, 12, 12),
    "BERT-large": (1024, 4096, 24, 16),
    "MiniLM-L6": (384, 1536, 6, 12),
}
GPUS = ("L4", "A100", "H100")
SHAPES = ((1, 128), (32, 128), (32, 512))
VERSIONS = (("trt", "8.6"), ("trt", "10.14"), ("trt", "11.4"), ("trt_rtx", "1.7"))


def section() -> str:
    """Both tables."""
    shapes = [f"{batch}x{sequence}" for batch, sequence in SHAPES]
    gains = [
        [model, figures.name, *(_gain(workload_of(model, *shape), figures) for shape in SHAPES)]
        for model in MODELS
        for figures in map(figures_of, GPUS)
    ]
    versions = [f"{'RTX' if backend == 'trt_rtx' else 'TensorRT'} {version}" for backend, version in VERSIONS]
    head = ["GPU", "INT8 TOPS", "GB/s", "cache, MB", "tokens", *versions]
    return "\n\n".join(
        [
            table(gains, ["model", "GPU", *shapes], "llrrr"),
            "The peaks of dense products, the number of tokens (batch x length) from which 2:4 products no longer wait "
            "for their weights, and whether a sparse INT8 kernel with INT8 output is known for MatMul. *Unknown* means "
            "that nobody has looked:",
            table([_peaks(figures) for figures in all_figures()], head, "lrrrr" + "l" * len(versions)),
        ]
    )


def workload_of(model: str, batch: int, sequence: int) -> Workload:
    """The pass of one of `MODELS`."""
    hidden, wide, layers, heads = MODELS[model]
    config: dict[str, object] = {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
    }
    return encoder_workload(FAMILIES["bert"], config, batch, sequence)


def _gain(work: Workload, figures: GpuFigures) -> str:
    estimate = gain_estimate(work, figures)
    low, high = sorted((estimate.memory.speedup, estimate.cache.speedup))
    limits = " to ".join(dict.fromkeys((f"{low:.2f}", f"{high:.2f}")))
    return f"{limits}; at most {gain_bound(work, figures).speedup:.2f}"


def _peaks(figures: GpuFigures) -> list[str]:
    kernels = [_kernel(backend, version, figures) for backend, version in VERSIONS]
    pays = any(answer in ("yes", "unknown") for answer in kernels)
    tokens = str(gain_bound(workload_of("BERT-base", 1, 128), figures).arithmetic_from_tokens) if pays else "–"
    peaks = [f"{value:g}" for value in (figures.int8_tops, figures.memory_gb_per_second, figures.cache_mb)]
    return [figures.name, *peaks, tokens, *kernels]


def _kernel(backend: str, version: str, figures: GpuFigures) -> str:
    target = sparsity_target(backend, version, figures.compute_capability)
    if target_problems(target):
        return "does not run"
    found = sparse_kernel_exists(
        backend=backend,
        version=version,
        compute_capability=target.compute_capability,
        weights="int8",
        form="matmul",
        output="int8",
    )
    return {True: "yes", False: "no", None: "unknown"}[found.exists]


def answer() -> str:
    """What `nxm doctor` prints for BERT-base on an L4, as a block of text."""
    from click.testing import CliRunner

    from nxm_export.cli import main as nxm

    hidden, ffn, layers, heads = MODELS["BERT-base"]
    config = {
        "model_type": "bert",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
    }
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "my-model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
        asked = ["doctor", str(model), "--gpu", "L4", "--shape", "32x128"]
        printed = CliRunner().invoke(nxm, asked, env={"COLUMNS": "80"}, catch_exceptions=False).stdout
        printed = printed.replace(str(model), model.name)
    lines = "\n".join(line.rstrip() for line in printed.strip().splitlines())
    return f"```text\n{lines}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into docs/{PAGE.name}")
    made = section()
    if parser.parse_args().write:
        write_section(PAGE, SECTION, made)
        write_section(PAGE, ANSWER, answer())
    else:
        print(made)


if __name__ == "__main__":
    main()
