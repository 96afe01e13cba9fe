"""What INT8 outputs cost before any training: the dense model with W8 weights, INT8 inputs, and some of its outputs in
INT8.

    python -m tools.experiments.output_ablation DENSE --train train.tsv --dev dev.tsv

One line per choice: mean KL(dense || quantized) in nats, agreement with the dense model, and MCC, over dev; then what
`compressors.training.output_sensitivity` measures on distorted training sentences, which is what decides.
"""

from __future__ import annotations

from compressors.freed_memory import keep_freed_memory
from compressors.quantization.fake_quant import quant_linears
from compressors.quantization.prepare_bake import calibrate, prepare
from compressors.settings import Settings
from compressors.training.output_sensitivity import output_costs
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.quantizer_placement import droppable_outputs
from nxm_export.data.metrics import mcc
from tools.experiments.one_shot import Dense, parser


def main() -> None:
    keep_freed_memory()
    dense = Dense.of(parser(__doc__, max_length=128).parse_args())
    family, config = dense.source.family, dense.source.config
    plan = family.uniform_plan(config, WeightSpec.parse("W8"))
    model = dense.model()
    prepare(model, plan, family, config)
    settings = Settings()
    calibrate(model, dense.batches(settings.calibration_samples), settings.range_percentile)
    print(f"dense: MCC {mcc(dense.logits, dense.labels):.4f}", flush=True)
    droppable, data = droppable_outputs(plan), dense.data
    costs = output_costs(model, droppable, data.train, data.pad_id, dense.task.output_kind, seed=0)
    layers = quant_linears(model)
    quantizers = {name: layer.output_quantizer for name, layer in layers.items() if layer.output_quantizer is not None}
    groups: dict[str, list[str]] = {"all outputs": list(quantizers), "no output": []}
    for name in quantizers:
        groups.setdefault(f"outputs of {family.role(name)}", []).append(name)
    groups |= {f"output of {name}": [name] for name in droppable}
    for title, names in groups.items():
        for name in quantizers:
            layers[name].output_quantizer = quantizers[name] if name in names else None
        logits = dense.predict(model)
        print(
            f"{title}: KL {dense.kl(logits):.4f}, agreement {dense.agreement(logits):.4f}, "
            f"MCC {mcc(logits, dense.labels):.4f}",
            flush=True,
        )
    for name, cost in costs.items():
        print(f"on distorted sentences, {name}: {cost:.4f}")


if __name__ == "__main__":
    main()
