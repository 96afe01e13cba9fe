"""Compressed checkpoints with the shape of real models, in seconds: random weights, pruned by magnitude, ranges of one
batch.

Kernels and times do not depend on what weights say, and parity is against PyTorch on the same weights. What
`tools.gpu.evidence` makes is calibrated as `nxm compress` does it, which takes minutes for a base model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from nxm_export.contract.checkpoint import save_plan
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.hf.protocols import AutoClass, SavedModel
from nxm_export.storage.atomic import atomic_dir
from tools.gpu.evidence import MODELS

if TYPE_CHECKING:
    import torch

VOCABULARY = 30522


def write_checkpoint(model: str, out: Path, layers: int | None = None) -> Path:
    """A BERT of the shape `model` names in `MODELS`, or of as many `layers`: 2:4, INT8, quantizers before and behind
    its products."""
    import torch
    import transformers

    if out.is_dir():
        return out
    hidden, own, heads, positions = MODELS[model]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers or own,
        num_attention_heads=heads,
        max_position_embeddings=positions,
    )
    made = cast("AutoClass", transformers.AutoModelForSequenceClassification).from_config(config)
    module = torch.nn.Module.eval(made)
    plan = FAMILIES["bert"].uniform_plan(config.to_dict(), WeightSpec.parse("2:4+W8"), placement="inputs-outputs")
    scales: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name in plan.weights:
            parameter = module.get_parameter(name)
            rounded, scale = _rounded(parameter)
            parameter.copy_(rounded)
            scales[f"{name}_scale"] = scale.numpy()
        scales |= _ranges(module, plan, min(64, positions))
    with atomic_dir(out) as scratch:
        cast(SavedModel, module).save_pretrained(scratch, save_original_format=False)
        save_plan(scratch, plan, scales)
    return out


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight with the two largest of every four, on its INT8 grid, scales (out,))."""
    import torch

    groups = weight.abs().reshape(weight.shape[0], -1, 4)
    kept = torch.zeros_like(groups).scatter_(-1, groups.topk(2, dim=-1).indices, 1.0).reshape(weight.shape)
    scale = (weight * kept).abs().amax(dim=1) / 127
    codes = torch.round(weight * kept / scale[:, None])
    return codes * scale[:, None] + 0.0, scale  # never -0.0


def _ranges(module: torch.nn.Module, plan: CompressionPlan, length: int) -> dict[str, np.ndarray]:
    """Scales of activations: the largest value of one batch of random tokens is code 127."""
    import torch

    found: dict[str, np.ndarray] = {}

    def watch(path: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            for kind, tensor in (("input_scale", inputs[0]), ("output_scale", output)):
                found[f"{path}.{kind}"] = np.asarray(float(tensor.abs().max()) / 127, np.float32)

        return hook

    for name in plan.weights:
        path = name.removesuffix(".weight")
        module.get_submodule(path).register_forward_hook(watch(path))
    ids = torch.randint(5, VOCABULARY, (2, length))
    module(input_ids=ids, attention_mask=torch.ones_like(ids))
    wanted = {
        f"{name.removesuffix('.weight')}.{kind}"
        for name, spec in plan.weights.items()
        for kind, bits in (("input_scale", spec.input_bits), ("output_scale", spec.output_bits))
        if bits
    }
    return {key: value for key, value in found.items() if key in wanted}
