"""What the output quantizers of rotated and gated matrices cost a trained ModernBERT.

    python -m tools.experiments.rotary_outputs --vocabulary MODEL --train SST-2/train.tsv --dev SST-2/dev.tsv

No published ModernBERT is on the machines that test this project. So a small one with random weights (four blocks:
global, local, local, global) and the vocabulary of MODEL is fine-tuned from nothing. Then it is compressed to 2:4 with
8 bits, with as many INT8 outputs as each arm has, and with each seed. No output is left in float for what it costs.
Prints JSON: the mean KL(dense || compressed) over dev in nats for each seed, and the accuracy over all seeds minus that
of the first arm, paired over dev sentences.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from compressors.freed_memory import keep_freed_memory
from compressors.models import resolve
from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from compressors.training.output_divergence import divergence
from nxm_export.contract.encoder_family import RESIDUAL
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.data.bootstrap_intervals import bootstrap_interval
from tools.provenance import versions

BLOCKS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
TASK = "classification"
SENTENCES = 20000  # to train on
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Sizes:
    hidden: int = 128
    wide: int = 192
    heads: int = 4


class Arm(TypedDict):
    """An arm: accuracy in percent and mean KL in nats for each seed; points of accuracy gained on the first arm, with
    the 95 % interval over sentences."""

    outputs: str
    accuracy: list[float]
    kl: list[float]
    gained: float
    interval: list[float]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--vocabulary", type=Path, required=True, help="a model directory, of which the tokenizer is taken"
    )
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--dense-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    settings = Settings(
        recipe="obs",
        steps=options.steps,
        dense_steps=options.dense_steps,
        dense_learning_rate=5e-4,
        learning_rate=3e-4,
        output_limit=None,
        max_length=64,
        threads=1,
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_model(scratch / "model", options.vocabulary, _Sizes())
        print(json.dumps(measure(scratch, options.train, options.dev, settings, options.seeds), indent=1))


def write_model(out: Path, vocabulary: Path, sizes: _Sizes) -> None:
    """A ModernBERT encoder with random weights, and the tokenizer of another model."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(vocabulary)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "cls", "sep")}
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.wide,
        num_hidden_layers=len(BLOCKS),
        num_attention_heads=sizes.heads,
        layer_types=BLOCKS,
        local_attention=16,
        classifier_pooling="mean",
        bos_token_id=special["cls_token_id"],
        eos_token_id=special["sep_token_id"],
        **special,
    )
    transformers.ModernBertModel(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def arms(whole: CompressionPlan) -> dict[str, CompressionPlan]:
    """Plans by which outputs they have in INT8."""
    from nxm_export.contract.families import FAMILIES

    family = FAMILIES[whole.model_type]

    def only(*written: str) -> CompressionPlan:
        weights = {
            name: spec if family.linear(name).writes in written else replace(spec, output_bits=None)
            for name, spec in whole.weights.items()
        }
        return replace(whole, weights=weights)

    others = {family.linear(name).writes for name in whole.weights} - {RESIDUAL}
    return {"none": only(), "residual": only(RESIDUAL), "rotated and gated": only(*others), "all": whole}


def measure(scratch: Path, train: str, dev: str, settings: Settings, seeds: int) -> dict[str, object]:
    """Every arm and seed, of the model in `scratch`."""
    kept = scratch / "dense.outputs.safetensors"
    finetune(
        scratch / "model",
        task=TASK,
        train=train,
        dev=dev,
        train_limit=SENTENCES,
        out=scratch / "dense",
        settings=settings,
        outputs=kept,
    )
    source = resolve(scratch / "dense")
    plans = arms(source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"), placement="inputs-outputs"))
    dense, labels = _outputs(kept)
    found: dict[str, list[Logits]] = {}
    for name, plan in plans.items():
        for seed in range(seeds):
            outputs = scratch / "outputs.safetensors"
            compress(
                scratch / "dense",
                task=TASK,
                train=train,
                dev=dev,
                train_limit=SENTENCES,
                plan=plan,
                out=scratch / f"{len(found)}-{seed}",
                settings=replace(settings, seed=seed),
                outputs=outputs,
            )
            found.setdefault(name, []).append(_outputs(outputs)[0])
            print(f"{name}, seed {seed}: done", file=sys.stderr, flush=True)
    return {
        "dev": len(labels),
        "dense_accuracy": 100.0 * float((dense.argmax(-1) == labels).mean()),
        "steps": [settings.dense_steps, settings.steps],
        "arms": [_arm(name, dense, logits, found["none"], labels) for name, logits in found.items()],
        "made_with": versions(["torch", "transformers"]),
    }


def _outputs(file: Path) -> tuple[Logits, npt.NDArray[np.int64]]:
    """(logits, labels) of dev."""
    tensors = load_file(file)
    return tensors["logits"].astype(np.float32), tensors["labels"].astype(np.int64)


def _arm(
    name: str, dense: Logits, found: Sequence[Logits], first: Sequence[Logits], labels: npt.NDArray[np.int64]
) -> Arm:
    right, reference = (
        np.array([logits.argmax(-1) == labels for logits in each], np.float64) for each in (found, first)
    )
    gained = 100.0 * (right - reference).mean(axis=0)  # of every sentence, over seeds
    low, high = bootstrap_interval(len(labels), lambda picks: float(gained[picks].mean()))
    pairs = [(torch.from_numpy(dense), torch.from_numpy(logits)) for logits in found]
    return {
        "outputs": name,
        "accuracy": [round(100.0 * float(row.mean()), 2) for row in right],
        "kl": [round(float(divergence(*pair)) / len(labels), 5) for pair in pairs],
        "gained": round(float(gained.mean()), 2),
        "interval": [round(low, 2), round(high, 2)],
    }


if __name__ == "__main__":
    main()
