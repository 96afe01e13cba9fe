"""The pair `prepare` / `bake`: it puts a plan's quantizers into a model and takes them out again, and what lies
between."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressors.pruning.layer_inputs import never_runs
from compressors.quantization.autograd import ACTIVATION_QMAX, ACTIVATION_QMIN, compute_dtype, fake_quantize
from compressors.quantization.embedding import QuantEmbedding, quant_embeddings
from compressors.quantization.fake_quant import ActivationQuantizer, QuantLinear, activation_quantizers, quant_linears
from compressors.quantization.observers import HistogramObserver
from nxm_export.contract.encoder_family import BLOCK, FFN, OPERANDS, Family
from nxm_export.contract.plan import CompressionPlan
from nxm_export.errors import ArtifactError
from nxm_export.hf.attention_choice import choose_attention

SOFTMAX_SCALE = 1.0 / 127.0  # probabilities lie in [0, 1], so the scale needs no calibration
_INT8_ATTENTION = "nxm_int8"  # the name of our attention function in transformers
_OPERANDS = "nxm_operands"  # where an attention module keeps its `OperandQuantizers`
_OF_A_LAYER = re.compile(r"\.(in|out)put_quantizer(\..*)?$")  # what a layer's quantizer adds to its path


def prepare(model: nn.Module, plan: CompressionPlan, family: Family, config: Mapping[str, object]) -> None:
    """Put the plan's quantizers into `model`, in place; `bake` takes them out again.

    Layers that read one tensor, as query, key and value do, share one input quantizer. Raises `PlanError` for a plan
    that the family has no place for.
    """
    plan.require_fits(family.model_type, family.weights(config))
    family.require_placement(plan)
    layers: dict[str, QuantLinear] = {}
    for name, spec in plan.weights.items():
        if spec.is_dense:
            continue
        path = name.removesuffix(".weight")
        parts = [part.name for part in family.linear(name).parts]
        layer = QuantLinear(model.get_submodule(path), spec, name, parts)  # type: ignore[arg-type]  # families name linears
        _replace(model, path, layer)
        layers[name] = layer
    for block in family.blocks(config):
        owners = _quantize_inputs(layers, block, family)
        if plan.residual == "int8":
            _quantize_residuals(model, block, family, owners)
    if plan.embedding == "int8":
        path = family.word_embedding.removesuffix(".weight")
        _replace(model, path, QuantEmbedding(model.get_submodule(path), family.word_embedding))  # type: ignore[arg-type]
    if plan.attention == "int8":
        use_int8_attention(model, family, plan, config)
    device = next(model.parameters()).device
    model.to(device)


def _quantize_inputs(layers: Mapping[str, QuantLinear], block: str, family: Family) -> dict[str, QuantLinear]:
    """Give the layers of a block their input quantizers; returns the layer that owns each tensor's, by tensor."""
    owners: dict[str, QuantLinear] = {}
    for tensor in family.tensors():
        readers = [layers[name] for name in family.readers(block, tensor) if name in layers]
        for layer in (layer for layer in readers if layer.spec.input_bits):
            owner = owners.setdefault(tensor, layer)
            if owner is layer:
                layer.input_quantizer = ActivationQuantizer()
            else:
                assert owner.input_quantizer is not None
                layer.share_input(owner.input_quantizer)
    return owners


def _quantize_residuals(model: nn.Module, block: str, family: Family, owners: Mapping[str, QuantLinear]) -> None:
    """Quantize what a block and its FFN read for all readers; quantizing again inside the layers then changes
    nothing."""
    attention, ffn = owners.get(BLOCK), owners.get(FFN)

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert attention is not None
        assert attention.input_quantizer is not None
        return attention.input_quantizer(args[0]), *args[1:]

    def behind(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert ffn is not None
        assert ffn.input_quantizer is not None
        return cast(Tensor, ffn.input_quantizer(output))

    if attention is not None:
        attention.residual_hooks.append(model.get_submodule(block).register_forward_pre_hook(before))
    if ffn is not None:
        norm = model.get_submodule(f"{block}.{family.ffn_norm}")
        ffn.residual_hooks.append(norm.register_forward_hook(behind))


@torch.no_grad()
def round_as_stored(model: nn.Module, plan: CompressionPlan) -> None:
    """Give a prepared model, in place, the weights that `bake` stores: on their patterns and grids, and in 16 bit where
    they are not quantized. Doing it again changes nothing."""
    for name, spec in plan.weights.items():
        if spec.is_dense:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.half())
    for layer in quant_linears(model).values():
        layer.weight.copy_(layer.baked()[0])


@torch.no_grad()
def bake(model: nn.Module, plan: CompressionPlan) -> dict[str, np.ndarray]:
    """Replace prepared layers by plain ones with baked weights, in place; returns the scales as saved on disk.

    Planned weights that are not quantized are rounded to float16 values: that is how they are counted and deployed.
    """
    round_as_stored(model, plan)
    scales: dict[str, np.ndarray] = {}
    for name, layer in quant_linears(model).items():
        path = name.removesuffix(".weight")
        for hook in layer.residual_hooks:
            hook.remove()
        weight, scale = layer.baked()
        if scale is not None:
            scales[f"{name}_scale"] = scale.cpu().numpy()
        if layer.input_factors is not None:
            scales[f"{path}.input_factors"] = layer.input_factors.cpu().numpy()
            weight = weight / layer.input_factors
        if layer.reads is not None:
            scales[f"{path}.input_scale"] = layer.reads.scale.cpu().numpy().reshape(())
        for written, output_scale in layer.output_scales().items():
            scales[f"{written.removesuffix('.weight')}.output_scale"] = output_scale.cpu().numpy().reshape(())
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight)
        if layer.bias is not None:
            plain.bias = layer.bias
        _replace(model, path, plain)
    scales |= _take_operands(model)
    for table in quant_embeddings(model):
        baked, scale = table.baked()
        scales[f"{table.name}_scale"] = scale.cpu().numpy()
        _replace(model, table.name.removesuffix(".weight"), table.plain(baked))
    return scales


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    percentile: float | None,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """Set every activation scale from the `percentile` of |x| over `batches`, or, where that is None, to that of least
    squared error, padding excluded, in constant memory; returns them, in the order of `activation_quantizers`.

    Raises `DataError` with the layer that reads or writes what is no number, or that never runs.
    """
    quantizers = activation_quantizers(model)
    device = next(model.parameters()).device
    with _observing(model), torch.no_grad():
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            for quantizer in quantizers:
                quantizer.token_mask = inputs["attention_mask"].bool()
            model(**inputs)
            advance()
        observers = [quantizer.observer for quantizer in quantizers if quantizer.observer]
        silent = [observer.where for observer in observers if observer.counts is None]
        if 0 < len(silent) < len(observers):  # where all are, there was no token
            raise never_runs(silent[0])
        scales = [observer.scale(ACTIVATION_QMAX, percentile) for observer in observers]
    set_scales(model, scales)
    return scales


def set_scales(model: nn.Module, scales: Iterable[float]) -> None:
    """Set every activation scale as `calibrate` returned it."""
    for quantizer, scale in zip(activation_quantizers(model), scales, strict=True):
        quantizer.set_scale(scale)


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Inside the block, a prepared model computes without its quantizers."""
    with _observing(model):
        yield


@contextmanager
def _observing(model: nn.Module) -> Iterator[None]:
    quantizers = {path: module for path, module in model.named_modules() if isinstance(module, ActivationQuantizer)}
    for path, quantizer in quantizers.items():
        quantizer.observer = HistogramObserver(_OF_A_LAYER.sub(".weight", path))
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = quantizer.token_mask = None


def require_invariants(model: nn.Module) -> None:
    """Raise `ArtifactError` if a layer with a fixed mask has a weight outside it, or more than N of M."""
    for name, layer in quant_linears(model).items():
        if layer.mask is None or layer.spec.pattern is None:
            continue
        revived = int((layer.weight.detach()[~layer.mask] != 0).sum())
        nonzeros = layer.mask.reshape(-1, layer.spec.pattern.m).sum(dim=-1)
        if revived or bool((nonzeros != layer.spec.pattern.n).any()):
            raise ArtifactError(
                f"{name}: {revived} masked weights came back to life, or its mask is not {layer.spec.pattern}; this is "
                "a bug"
            )


class OperandQuantizers(nn.ModuleDict):
    """The quantizers of the `operands` that attention multiplies and no linear layer quantizes: query and key behind a
    rotation, and a value that leaves its layer in float."""

    def __init__(self, operands: Sequence[str]) -> None:
        super().__init__({operand: ActivationQuantizer() for operand in operands})

    def quantized(self, operand: str, x: Tensor) -> Tensor:
        """`x` (batch, heads, sequence, head) on the operand's grid, where it has one here."""
        if operand not in self:
            return x
        tokens = x.transpose(1, 2)  # quantizers count tokens by (batch, sequence)
        return cast(Tensor, self[operand](tokens)).transpose(1, 2)


def use_int8_attention(model: nn.Module, family: Family, plan: CompressionPlan, config: Mapping[str, object]) -> None:
    """Route attention through quantized probabilities. Query, key and value are quantized at their layers' outputs, or
    by `OperandQuantizers` where those are not what is multiplied."""
    if family.attention.interface:
        _choose_int8_attention(model)
    for block in family.blocks(config):
        if family.attention.dropout:
            dropout = model.get_submodule(f"{block}.{family.attention.path}.{family.attention.dropout}")
            dropout.register_forward_pre_hook(_quantized_first)
        if operands := family.own_operands(plan, block):
            setattr(model.get_submodule(f"{block}.{family.attention.path}"), _OPERANDS, OperandQuantizers(operands))


def _choose_int8_attention(model: nn.Module) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_INT8_ATTENTION, _int8_attention)
    AttentionMaskInterface.register(_INT8_ATTENTION, eager_mask)
    choose_attention(model, _INT8_ATTENTION)


def _take_operands(model: nn.Module) -> dict[str, np.ndarray]:
    """Take the operands' quantizers out of a model, in place; returns their scales as saved on disk."""
    scales: dict[str, np.ndarray] = {}
    for path, attention in list(model.named_modules()):
        quantizers = getattr(attention, _OPERANDS, None)
        if isinstance(quantizers, OperandQuantizers):
            for operand, module in quantizers.items():
                quantizer = cast(ActivationQuantizer, module)
                scales[f"{path}.{operand}_scale"] = quantizer.scale.cpu().numpy().reshape(())
            delattr(attention, _OPERANDS)
    return scales


def _int8_attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, sequence, head)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention with INT8 probabilities; the signature is that of transformers' attention functions."""
    quantizers = getattr(module, _OPERANDS, None)
    if isinstance(quantizers, OperandQuantizers):
        query, key, value = (
            quantizers.quantized(operand, x) for operand, x in zip(OPERANDS, (query, key, value), strict=True)
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = _quantized(scores.softmax(dim=-1))
    probabilities = functional.dropout(probabilities.to(compute_dtype(query)), dropout, module.training)
    context = torch.matmul(probabilities, value.to(probabilities.dtype)).transpose(1, 2).contiguous()
    return context, probabilities


def _quantized_first(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    """For the dropout of attention without an interface, which reads the probabilities."""
    return (_quantized(args[0]),)


def _quantized(probabilities: Tensor) -> Tensor:
    scale = torch.tensor([SOFTMAX_SCALE], device=probabilities.device)
    return fake_quantize(probabilities, scale, ACTIVATION_QMIN, ACTIVATION_QMAX)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
