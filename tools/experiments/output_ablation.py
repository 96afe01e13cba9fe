"""What INT8 outputs cost before any training: the dense model with W8 weights, INT8 inputs, and some of its outputs in INT8.

    python -m tools.experiments.output_ablation DENSE --train train.tsv --dev dev.tsv

One line per choice: mean KL(dense || quantized) in nats, agreement with the dense model, and MCC, over dev; then what
`compressors.training.output_sensitivity` measures on distorted training sentences, which is what decides.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn

from compressors.malloc import keep_freed_memory
from compressors.models import load_model, load_tokenizer, resolve
from compressors.quantization.fake_quant import calibrate, prepare, quant_linears
from compressors.search.sensitivity import divergence
from compressors.settings import Settings
from compressors.training.output_sensitivity import output_costs
from compressors.training.task_data import read_task_data
from compressors.training.trainer import collate, predict
from nxm_export.contract.placement import residual_output_weights
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import task_named
from nxm_export.data.examples import Columns, label_array, sorted_batches
from nxm_export.data.metrics import mcc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--max-length", type=int, default=128)
    chosen = parser.parse_args()
    keep_freed_memory()
    settings = Settings(max_length=chosen.max_length)
    source, task = resolve(chosen.dense), task_named("classification")
    data = read_task_data(source, task, chosen.train, chosen.dev, settings, Columns(), load_tokenizer(source), None)
    labels, dense = label_array(data.dev), predict(load_model(source, task), data.dev, data.pad_id)
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("W8"))
    model = load_model(source, task).eval()
    prepare(model, plan, source.family, source.config)
    pick = np.random.default_rng(0).permutation(len(data.train))[: settings.calibration_samples]
    samples = [data.train[i] for i in sorted(pick)]
    batches = [collate([samples[i] for i in batch], data.pad_id) for batch in sorted_batches(samples, 32)]
    calibrate(model, batches, settings.percentile)

    def show(name: str, network: nn.Module) -> None:
        found = predict(network, data.dev, data.pad_id)
        kl = divergence(torch.from_numpy(dense), torch.from_numpy(found)) / len(found)
        agreement = (found.argmax(-1) == dense.argmax(-1)).mean()
        print(f"{name}: KL {kl:.4f}, agreement {agreement:.4f}, MCC {mcc(found, labels):.4f}", flush=True)

    print(f"dense: MCC {mcc(dense, labels):.4f}", flush=True)
    costs = output_costs(model, residual_output_weights(plan), data.train, data.pad_id, task.output_kind, seed=0)
    layers = quant_linears(model)
    quantizers = {name: layer.output_quantizer for name, layer in layers.items() if layer.output_quantizer is not None}
    groups: dict[str, list[str]] = {"all outputs": list(quantizers), "no output": []}
    for name in quantizers:
        groups.setdefault(f"outputs of {source.family.role(name)}", []).append(name)
    groups |= {f"output of {name}": [name] for name in residual_output_weights(plan)}
    for title, names in groups.items():
        for name in quantizers:
            layers[name].output_quantizer = quantizers[name] if name in names else None
        show(title, model)
    for name, cost in costs.items():
        print(f"on distorted sentences, {name}: {cost:.4f}")


if __name__ == "__main__":
    main()
