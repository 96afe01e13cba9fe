"""What channel permutation and activation-weighted masks save before any training: pruned weights, everything else as it was.

    python -m tools.experiments.mask_ablation DENSE --train train.tsv --dev dev.tsv

One line per pattern and choice: accuracy, agreement with the dense model, and mean KL(dense || pruned) in nats over dev.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from compressors.malloc import keep_freed_memory
from compressors.models import load_model, load_tokenizer, resolve
from compressors.pruning.permutation import permute_channels, permute_residual, residual_order
from compressors.pruning.sparsegpt import input_moments
from compressors.quantization.fake_quant import bake, prepare, quant_linears
from compressors.search.sensitivity import divergence
from compressors.settings import Settings
from compressors.training.task_data import read_task_data
from compressors.training.trainer import collate, predict
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import task_named
from nxm_export.data.examples import Columns, label_array

SAMPLES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--patterns", default="2:4,1:4")
    parser.add_argument("--max-length", type=int, default=64)
    chosen = parser.parse_args()
    keep_freed_memory()
    source, task = resolve(chosen.dense), task_named("classification")
    data = read_task_data(
        source, task, chosen.train, chosen.dev, Settings(max_length=chosen.max_length), Columns(), load_tokenizer(source), None
    )  # fmt: skip
    pick = np.random.default_rng(0).permutation(len(data.train))[:SAMPLES]
    batches = [collate([data.train[i] for i in pick[at : at + 32]], data.pad_id) for at in range(0, len(pick), 32)]
    labels = label_array(data.dev)
    wanted = predict(load_model(source, task), data.dev, data.pad_id)
    print(f"dense: accuracy {(wanted.argmax(-1) == labels).mean():.4f}", flush=True)
    for pattern in chosen.patterns.split(","):
        plan = source.family.uniform_plan(source.config, WeightSpec.parse(pattern), placement="inputs")
        for permuted in ("", "blocks", "blocks and residual"):
            for activation in (False, True):
                model = load_model(source, task).eval()
                prepare(model, plan, source.family, source.config)
                layers = quant_linears(model)
                moments = input_moments(model, batches, diagonal=True) if activation else {}
                for name, layer in layers.items():
                    layer.importance = moments[name].sqrt() if activation else None
                shares = permute_channels(model, plan, source.family, source.config) if permuted else {}
                if permuted.endswith("residual"):
                    order, kept = residual_order(model, plan, source.family, source.config)
                    permute_residual(model, order, source.family, source.config)
                    shares |= kept
                for layer in layers.values():
                    layer.harden()
                bake(model, plan)
                found = predict(model, data.dev, data.pad_id)
                kl = divergence(torch.from_numpy(wanted), torch.from_numpy(found)) / len(found)
                name = f"{pattern}{' activation' if activation else ''}{', permuted: ' if permuted else ''}{permuted}"
                saved = ", kept {:.4f} -> {:.4f}".format(*np.mean(list(shares.values()), axis=0)) if shares else ""
                print(
                    f"{name}: accuracy {(found.argmax(-1) == labels).mean():.4f}, "
                    f"agreement {(found.argmax(-1) == wanted.argmax(-1)).mean():.4f}, KL {kl:.4f}{saved}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
