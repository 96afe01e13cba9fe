"""Which INT8 outputs cost a model too much, measured before training starts.

What a block writes into the residual stream has, in some models and layers, a few channels far larger than all others
(Bondarenko et al. 2021, arXiv 2109.12948). One scale for the whole tensor then leaves the others a handful of codes,
and no training of a compressed model's length brings that back (docs/research-notes.md). Such outputs are better left
in float: the product itself stays on integers, and its kernel writes 16 bit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compressors.quantization.fake_quant import quant_linears
from compressors.training.augmentation import distorted
from compressors.training.output_divergence import divergence, real_logits
from compressors.training.trainer import collate
from nxm_export.data.features import Features, sorted_batches
from nxm_export.errors import DataError
from nxm_export.progress import Progress, silent

SAMPLES = 128


@torch.no_grad()
def output_costs(
    student: nn.Module,
    outputs: Sequence[str],
    features: Sequence[Features],
    pad_id: int,
    output_kind: str,
    seed: int,
    progress: Progress = silent,
) -> dict[str, float]:
    """By weight: mean divergence per sample that its output quantizer brings by itself, against none of `outputs`
    quantized.

    In nats for classes, summed over a sample's tokens or labels, relative to the squared size for vectors and to the
    variance for scores. The samples are
    distorted ones (`compressors.training.augmentation`) of `features`: of those that it was trained on a model is too
    sure for a change to show. `student` is prepared and calibrated, and comes back as it was. `progress` hears
    ("outputs", done, of how many). Raises `DataError` where answers or costs are no numbers, as the cost of the scores
    of a single sample, which have no variance.
    """
    layers = quant_linears(student)
    quantizers = {
        name: layers[name].output_quantizer
        for name in outputs
        if name in layers and layers[name].output_quantizer is not None  # a matrix left dense is no layer of ours
    }
    if not quantizers:
        return {}
    samples = _distorted_samples(features, seed)
    batches = [collate([samples[i] for i in batch], pad_id) for batch in sorted_batches(samples, 32)]
    was_training = student.training
    student.eval()
    for name in quantizers:
        layers[name].output_quantizer = None
    reference = _answers(student, batches, output_kind)
    if not all(bool(torch.isfinite(answers).all()) for answers in reference):
        raise DataError(
            "what the model answers to training samples is NaN or infinite; the model is broken before compression"
        )
    scale = _variance(torch.cat(reference)) if output_kind == "identity" else 1.0
    costs = {}
    for done, (name, quantizer) in enumerate(quantizers.items()):
        progress("outputs", done, len(quantizers))
        layers[name].output_quantizer = quantizer
        actual = _answers(student, batches, output_kind)
        layers[name].output_quantizer = None
        pairs = zip(reference, actual, strict=True)
        total = sum(divergence(expected, logits, output_kind) for expected, logits in pairs)
        costs[name] = total / len(samples) / max(scale, 1e-12)
        if not math.isfinite(costs[name]):
            raise DataError(
                f"{name}: what its INT8 output costs on {len(samples)} training samples is {costs[name]}; give more "
                "samples, or leave all outputs in INT8 with --output-limit inf"
            )
    progress("outputs", len(quantizers), len(quantizers))
    for name, quantizer in quantizers.items():
        layers[name].output_quantizer = quantizer
    student.train(was_training)
    return costs


def _variance(scores: Tensor) -> float:
    """NaN of a single score."""
    return float(scores.double().var()) if scores.numel() > 1 else math.nan


def _distorted_samples(features: Sequence[Features], seed: int) -> list[Features]:
    rng = random.Random(seed)
    picked = rng.sample(list(features), min(SAMPLES, len(features)))
    pool = [token for sample in picked for token in sample["input_ids"][1:-1]]
    return [distorted(sample, pool, rng) for sample in picked] if pool else picked


def _answers(student: nn.Module, batches: Sequence[Mapping[str, Tensor]], output_kind: str) -> list[Tensor]:
    """Logits of every batch."""
    device = next(student.parameters()).device
    answers = []
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        answers.append(real_logits(student(**inputs).logits, inputs["attention_mask"], output_kind))
    return answers
