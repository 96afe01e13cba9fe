"""Channels far larger than the others, evened out in front of a quantizer, where nothing is trained.

What the two products of an FFN read has, for a few tokens, values five to fifteen times the others in one channel or
two. One INT8 step for all channels then leaves the others a few codes. So such a channel is divided by a factor, and
the weights that read it are multiplied by it (as in SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, which does so for
all channels). Factors are powers of two: dividing and multiplying by them rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compressors.pruning.layer_inputs import Batches
from compressors.quantization.fake_quant import quant_linears
from compressors.quantization.prepare_bake import in_float
from nxm_export.contract.encoder_family import FFN, WIDE, Family
from nxm_export.contract.plan import CompressionPlan, WeightSpec

_REACH = 1.5  # how far beyond the median channel one may reach; 1, 1.5, 3 and 4 were tried (docs/research-notes.md)
_LARGEST_FACTOR = 1024.0
_BITS = 8  # of the weights: the rows of narrower ones would lose codes to the columns that grow


def readers_to_even(family: Family, config: Mapping[str, object], residual: str = "float") -> list[list[str]]:
    """The weights that read each tensor that is evened out, if all of them are `evened`: those which the FFN's products
    read, but for one that the residual (``int8``) reads quantized, too."""
    tensors = (WIDE,) if residual == "int8" else (FFN, WIDE)
    return [list(family.readers(block, tensor)) for block in family.blocks(config) for tensor in tensors]


def evened(spec: WeightSpec) -> bool:
    """Whether what a weight of this spec reads is evened out."""
    return spec.weight_bits == _BITS and spec.input_bits is not None


def channel_factors(largest: Tensor) -> Tensor:
    """Powers of two (channels,), 1 or more, that bring the `largest` |x| of every channel near the median's."""
    median = largest.median()
    if not float(median) > 0:
        return torch.ones_like(largest)
    return torch.exp2(torch.log2((largest / (_REACH * median)).clamp(1.0, _LARGEST_FACTOR)).round())


@torch.no_grad()
def even_out_channels(
    model: nn.Module, plan: CompressionPlan, family: Family, config: Mapping[str, object], batches: Batches
) -> None:
    """Even out what the FFN's products of a prepared `model` read on `batches`, in place; it computes the same.

    Left alone are tensors that a weight of other than 8 bits reads, and those that the residual reads quantized, too.
    """
    layers = quant_linears(model)
    planned = [
        [layers[name] for name in names if name in layers] for names in readers_to_even(family, config, plan.residual)
    ]
    groups = [readers for readers in planned if readers and all(evened(layer.spec) for layer in readers)]
    if not groups:
        return
    with in_float(model):
        reached = largest_inputs(model, [readers[0] for readers in groups], batches)
    for readers, largest in zip(groups, reached, strict=True):
        factors = channel_factors(largest)
        if bool((factors > 1).any()):
            for layer in readers:
                layer.even_out(factors)


@torch.no_grad()
def largest_inputs(model: nn.Module, layers: Sequence[nn.Linear], batches: Batches) -> list[Tensor]:
    """The largest |x| (in,) of every channel that each layer reads on `batches`, padding excluded."""
    found = [torch.zeros(layer.in_features, device=layer.weight.device) for layer in layers]
    real = torch.empty(0)

    def watch(at: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0][real]
            if len(tokens):
                found[at] = torch.maximum(found[at], tokens.float().abs().amax(dim=0))

        return hook

    handles = [layer.register_forward_pre_hook(watch(at)) for at, layer in enumerate(layers)]
    try:
        for batch in batches:
            inputs = {key: value.to(found[0].device) for key, value in batch.items() if key != "labels"}
            real = inputs["attention_mask"].bool()
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
