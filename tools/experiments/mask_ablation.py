"""What channel permutation and activation-weighted masks save before any training: pruned weights, everything else as
it was.

    python -m tools.experiments.mask_ablation DENSE --train train.tsv --dev dev.tsv

One line per pattern and choice: accuracy, agreement with the dense model, and mean KL(dense || pruned) in nats over
dev.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from compressors.freed_memory import keep_freed_memory
from compressors.pruning.layer_inputs import second_moments
from compressors.pruning.permutation import permute_channels, permute_residual, residual_order
from compressors.quantization.fake_quant import quant_linears
from compressors.quantization.prepare_bake import bake, prepare
from nxm_export.contract.plan import WeightSpec
from tools.experiments.one_shot import Dense, parser

SAMPLES = 256
PERMUTED = ("", "blocks", "blocks and residual")


def main() -> None:
    arguments = parser(__doc__, max_length=64)
    arguments.add_argument("--patterns", default="2:4,1:4")
    chosen = arguments.parse_args()
    keep_freed_memory()
    dense = Dense.of(chosen)
    print(f"dense: accuracy {(dense.logits.argmax(-1) == dense.labels).mean():.4f}", flush=True)
    for pattern, permuted, activation in product(chosen.patterns.split(","), PERMUTED, (False, True)):
        name = f"{pattern}{' activation' if activation else ''}{', permuted: ' if permuted else ''}{permuted}"
        print(f"{name}: {pruned(dense, pattern, permuted, activation)}", flush=True)


def pruned(dense: Dense, pattern: str, permuted: str, activation: bool) -> str:
    """How a model with such masks does on dev, as a line of text."""
    family, config = dense.source.family, dense.source.config
    plan = family.uniform_plan(config, WeightSpec.parse(pattern), placement="inputs")
    model = dense.model()
    prepare(model, plan, family, config)
    layers = quant_linears(model)
    squares = second_moments(model, layers, dense.batches(SAMPLES), diagonal=True) if activation else {}
    for name, layer in layers.items():
        layer.importance = squares[name].sqrt() if activation else None
    shares = permute_channels(model, plan, family, config) if permuted else {}
    if permuted.endswith("residual"):
        order, residual_shares = residual_order(model, plan, family, config)
        permute_residual(model, order, family, config)
        shares |= residual_shares
    for layer in layers.values():
        layer.freeze_mask()
    bake(model, plan)
    logits = dense.predict(model)
    accuracy = (logits.argmax(-1) == dense.labels).mean()
    saved = ", kept {:.4f} -> {:.4f}".format(*np.mean(list(shares.values()), axis=0)) if shares else ""
    return f"accuracy {accuracy:.4f}, agreement {dense.agreement(logits):.4f}, KL {dense.kl(logits):.4f}{saved}"


if __name__ == "__main__":
    main()
