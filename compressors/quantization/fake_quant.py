"""Fake quantization with learned step sizes, and the pair `prepare` / `bake` that puts it into a model and takes it out.

Codes and their gradients are those of `compressors.quantization.autograd`. Steps are learned as logarithms, so that they stay positive.

A `QuantLinear` multiplies integer codes and applies both scales to the product,
``y = (codes(x) @ codes(W).T) * s_x * s_w + b``: the codes are exact in bfloat16, where ``code * scale`` is not, so a
mixed-precision forward pass sees the same integers as the exported engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressors.distributed import world_size
from compressors.projections import magnitude_scores, mse_scale, nm_mask
from compressors.quantization.autograd import (
    ACTIVATION_QMAX,
    ACTIVATION_QMIN,
    Codes,
    FakeQuantize,
    FollowedMask,
    Product,
    compute_dtype,
    learned,
)
from compressors.quantization.embedding import QuantEmbedding, tables
from compressors.quantization.observers import HistogramObserver
from nxm_export.contract.families import Family
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.errors import ArtifactError

SOFTMAX_SCALE = 1.0 / 127.0  # probabilities lie in [0, 1], so the scale needs no calibration


class ActivationQuantizer(nn.Module):
    """Static per-tensor symmetric INT8 quantizer with a learned step; may be shared by several readers of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.readers = 1
        self.observer: HistogramObserver | None = None
        self.token_mask: Tensor | None = None  # (batch, sequence) bool while calibrating
        self._cached: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._reads = 0

    @property
    def scale(self) -> Tensor:
        """The step as it will be deployed, float32 (1,)."""
        return self.log_scale.detach().float().exp()

    def set_scale(self, scale: float) -> None:
        """Set the step, for example from calibration."""
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))

    def observe(self, x: Tensor) -> None:
        """Count the values of `x` (batch, sequence, features) that are not padding."""
        assert self.observer is not None
        self.observer.observe(x if self.token_mask is None else x[self.token_mask])

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, step) of `x`; computed once for all readers of the same tensor."""
        if self._cached is not None and self._cached[0] is x:
            result = self._cached[1]
        else:
            scale = self.step_for(x)
            result = (Codes.apply(x, scale, compute_dtype(x)), scale)
            self._cached, self._reads = (x, result), 0
        self._reads += 1
        if self._reads >= self.readers:
            self._cached = None
        return result

    def step_for(self, x: Tensor) -> Tensor:
        """The step (1,), its gradient damped for the size of the whole batch that `x` is of."""
        return learned(self.log_scale, x.numel() * world_size(), ACTIVATION_QMAX)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        if self.observer is not None:
            self.observe(x)
            return x
        return FakeQuantize.apply(x, self.step_for(x), ACTIVATION_QMIN, ACTIVATION_QMAX)


class QuantLinear(nn.Linear):
    """A linear layer under a `WeightSpec`: mask, weight codes and activation quantizers, all trainable through.

    `mask` is None until the layer is hardened; from then on it is fixed and nothing can revive a masked weight.
    `quantize_weight` is off in those ADMM modes that leave the weight in float. While `follow_decay` is set (SR-STE) and
    the mask is not fixed, every forward pass uses the magnitude mask of the weight as it is.
    """

    mask: Tensor | None

    def __init__(self, linear: nn.Linear, spec: WeightSpec, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.spec, self.name = spec, name
        self.quantize_weight = spec.weight_bits is not None
        self.register_buffer("mask", None)
        self._gate: Tensor | None = None
        self.follow_decay: float | None = None
        self.importance: Tensor | None = None  # (in,) of each input, for the choice of masks; None = magnitude alone
        if spec.weight_bits:
            self.log_scale = nn.Parameter(torch.zeros(self.out_features, 1, device=self.weight.device))
            self.reset_scale()
        self.input_quantizer: ActivationQuantizer | None = None
        self._shared_input: list[ActivationQuantizer] = []  # a list, so that nn.Module does not register it twice
        self.output_quantizer = ActivationQuantizer() if spec.output_bits else None
        self.residual_hooks: list[Any] = []  # handles of hooks outside this layer that use its input quantizer

    @property
    def reads(self) -> ActivationQuantizer | None:
        """The quantizer of the tensor that this layer reads, its own or a shared one."""
        return self._shared_input[0] if self._shared_input else self.input_quantizer

    def share_input(self, quantizer: ActivationQuantizer) -> None:
        """Read through a quantizer that another layer owns."""
        self._shared_input = [quantizer]
        quantizer.readers += 1

    @property
    def weight_scale(self) -> Tensor:
        """Deployed weight step per output channel, float32 (out, 1)."""
        return self.log_scale.detach().float().exp()

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Set the weight steps to those of least squared error for the weight as it is."""
        assert self.spec.qmax is not None
        self.log_scale.copy_(mse_scale(self.weight.float(), self.spec.qmax).log())

    @torch.no_grad()
    def harden(self, scores: Tensor | None = None) -> None:
        """Fix the mask (the N highest `scores`, by default `magnitude_scores`, of each group), zero the rest, and refit the
        steps."""
        if self.spec.pattern:
            self.mask = nm_mask(self._scores() if scores is None else scores, self.spec.pattern)
            self._gate = None
            self.weight.mul_(self.mask)
        if self.spec.weight_bits:
            self.quantize_weight = True
            self.reset_scale()

    def _scores(self) -> Tensor:
        """What masks are chosen by, (out, in)."""
        importance = None if self.importance is None else self.importance.to(self.weight.device)
        return magnitude_scores(self.weight.detach(), importance)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out) of x (..., in)."""
        quantizer = self.reads
        if quantizer is not None and quantizer.observer is not None:
            quantizer.observe(x)
            quantizer = None
        y = self._product(x, quantizer)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _product(self, x: Tensor, quantizer: ActivationQuantizer | None) -> Tensor:
        if quantizer is None:
            return functional.linear(x, self._float_weight(), self.bias)
        codes, step = quantizer.codes(x)
        scale: Tensor | None = None
        if self.quantize_weight:
            assert self.spec.qmax is not None
            scale = learned(self.log_scale, self.in_features, self.spec.qmax)  # (out, 1)
        gate = self._mask_as(self.weight.dtype)
        # As a plain layer's would be under autocast, which halves what the layers behind it keep for the way back; but a
        # quantizer reads it in float32, as engines do.
        dtype = codes.dtype if self.output_quantizer is None else torch.float32
        return Product.apply(codes, step, self._followed(), scale, self.bias, gate, self.spec.qmax or 0, dtype)

    def _float_weight(self) -> Tensor:
        gate = self._mask_as(self.weight.dtype)
        return self._followed() if gate is None else self.weight * gate

    def _followed(self) -> Tensor:
        """The weight, under its own magnitude mask while SR-STE looks for one."""
        if self.follow_decay is None or self.mask is not None or self.spec.pattern is None:
            return self.weight
        mask = nm_mask(self._scores(), self.spec.pattern)
        return FollowedMask.apply(self.weight, mask, self.follow_decay)

    def _mask_as(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as 0 and 1 in `dtype`: products with boolean tensors are slow. Rebuilt when mask or device change."""
        if self.mask is None:
            return None
        if self._gate is None or self._gate.dtype != dtype or self._gate.device != self.mask.device:
            self._gate = self.mask.to(dtype)
        return self._gate

    @torch.no_grad()
    def baked(self) -> tuple[Tensor, Tensor | None]:
        """(float32 weight exactly on its pattern and grid, scales (out,) or None)."""
        weight = self.weight.float()
        if self.mask is not None:
            weight = weight * self.mask
        if not self.spec.weight_bits:
            return weight.half().float() + 0.0, None  # deployed in 16 bit, and stored so; never -0.0
        assert self.spec.qmax is not None
        scale = self.weight_scale
        codes = torch.div(weight, scale).round_().clamp_(-self.spec.qmax, self.spec.qmax)
        return codes.add_(0.0) * scale, scale.squeeze(-1)  # + 0.0 turns -0.0 into 0.0: a code has no sign of zero


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The prepared layers of a model by weight name, in model order."""
    return {module.name: module for module in model.modules() if isinstance(module, QuantLinear)}


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """Every activation quantizer of a prepared model, each once."""
    return [module for module in model.modules() if isinstance(module, ActivationQuantizer)]


def prepare(model: nn.Module, plan: CompressionPlan, family: Family, config: Mapping[str, Any]) -> None:
    """Put the plan's quantizers into `model`, in place; `bake` takes them out again.

    Query, key and value read one tensor, so those of them that are quantized share one input quantizer.
    """
    plan.require_fits(family.model_type, family.weights(config))
    family.require_placement(plan)
    layers: dict[str, QuantLinear] = {}
    for name, spec in plan.weights.items():
        if spec.is_dense:
            continue
        path = name.removesuffix(".weight")
        layer = QuantLinear(model.get_submodule(path), spec, name)  # type: ignore[arg-type]  # families name linears
        _replace(model, path, layer)
        layers[name] = layer
    for block in family.blocks(config):
        first: QuantLinear | None = None
        for role in ("query", "key", "value"):
            layer_ = layers.get(f"{family.linear(block, role)}.weight")
            if layer_ is None or not layer_.spec.input_bits:
                continue
            if first is None:
                first, layer_.input_quantizer = layer_, ActivationQuantizer()
            else:
                assert first.input_quantizer is not None
                layer_.share_input(first.input_quantizer)
        for role in ("attention_output", "ffn_up", "ffn_down"):
            layer_ = layers.get(f"{family.linear(block, role)}.weight")
            if layer_ is not None and layer_.spec.input_bits:
                layer_.input_quantizer = ActivationQuantizer()
        if plan.residual == "int8":
            _quantize_residuals(model, block, family, first, layers.get(f"{family.linear(block, 'ffn_up')}.weight"))
    if plan.embedding == "int8":
        path = family.word_embedding.removesuffix(".weight")
        _replace(model, path, QuantEmbedding(model.get_submodule(path), family.word_embedding))  # type: ignore[arg-type]
    device = next(model.parameters()).device
    model.to(device)
    if plan.attention == "int8":
        use_int8_attention(model)


def _quantize_residuals(
    model: nn.Module, block: str, family: Family, attention: QuantLinear | None, ffn: QuantLinear | None
) -> None:
    """Quantize what a block and its FFN read for all readers; quantizing again inside the layers then changes nothing."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert attention is not None
        assert attention.input_quantizer is not None
        return attention.input_quantizer(args[0]), *args[1:]

    def behind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert ffn is not None
        assert ffn.input_quantizer is not None
        return ffn.input_quantizer(output)  # type: ignore[no-any-return]  # a module's call is untyped

    if attention is not None:
        attention.residual_hooks.append(model.get_submodule(block).register_forward_pre_hook(before))
    if ffn is not None and ffn.input_quantizer is not None:
        norm = model.get_submodule(f"{block}.{family.attention_norm}")
        ffn.residual_hooks.append(norm.register_forward_hook(behind))


@torch.no_grad()
def bake(model: nn.Module, plan: CompressionPlan) -> dict[str, np.ndarray]:
    """Replace prepared layers by plain ones with baked weights, in place; returns the scales as saved on disk.

    Planned weights that are not quantized are rounded to float16 values: that is how they are counted and deployed.
    """
    for name, spec in plan.weights.items():
        if spec.is_dense:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.half())
    scales: dict[str, np.ndarray] = {}
    for name, layer in quant_linears(model).items():
        path = name.removesuffix(".weight")
        for hook in layer.residual_hooks:
            hook.remove()
        weight, scale = layer.baked()
        if scale is not None:
            scales[f"{name}_scale"] = scale.cpu().numpy()
        for kind, quantizer in (("input_scale", layer.reads), ("output_scale", layer.output_quantizer)):
            if quantizer is not None:
                scales[f"{path}.{kind}"] = quantizer.scale.cpu().numpy().reshape(())
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight)
        if layer.bias is not None:
            plain.bias = layer.bias
        _replace(model, path, plain)
    for table in tables(model):
        baked, scale = table.baked()
        scales[f"{table.name}_scale"] = scale.cpu().numpy()
        _replace(model, table.name.removesuffix(".weight"), table.plain(baked))
    return scales


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    percentile: float,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Set every activation step from the `percentile` of |x| over `batches`, padding excluded, in constant memory."""
    quantizers = activation_quantizers(model)
    device = next(model.parameters()).device
    with _observing(quantizers), torch.no_grad():
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            for quantizer in quantizers:
                quantizer.token_mask = inputs["attention_mask"].bool()
            model(**inputs)
            advance()
        scales = [
            quantizer.observer.scale(ACTIVATION_QMAX, percentile) for quantizer in quantizers if quantizer.observer
        ]
    for quantizer, scale in zip(quantizers, scales, strict=True):
        quantizer.set_scale(scale)


@contextmanager
def _observing(quantizers: list[ActivationQuantizer]) -> Iterator[None]:
    for quantizer in quantizers:
        quantizer.observer = HistogramObserver()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observer = quantizer.token_mask = None


def require_invariants(model: nn.Module) -> None:
    """Raise `ArtifactError` if a hardened layer keeps a weight outside its mask or more than N of M."""
    for name, layer in quant_linears(model).items():
        if layer.mask is None or layer.spec.pattern is None:
            continue
        revived = int((layer.weight.detach()[~layer.mask] != 0).sum())
        kept = layer.mask.reshape(-1, layer.spec.pattern.m).sum(dim=-1)
        if revived or bool((kept != layer.spec.pattern.n).any()):
            raise ArtifactError(
                f"{name}: {revived} masked weights came back to life, or its mask is not {layer.spec.pattern}; this is a bug"
            )


def use_int8_attention(model: nn.Module) -> None:
    """Route attention through quantized probabilities; query, key and value are quantized at their layers' outputs."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("nxm_int8", _int8_attention)
    AttentionMaskInterface.register("nxm_int8", eager_mask)
    model.set_attn_implementation("nxm_int8")  # type: ignore[operator]


def _int8_attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, sequence, head)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1)
    scale = torch.tensor([SOFTMAX_SCALE], device=query.device)
    probabilities = FakeQuantize.apply(probabilities, scale, ACTIVATION_QMIN, ACTIVATION_QMAX)
    probabilities = functional.dropout(probabilities.to(compute_dtype(query)), dropout, module.training)
    context = torch.matmul(probabilities, value.to(probabilities.dtype)).transpose(1, 2).contiguous()
    return context, probabilities


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
