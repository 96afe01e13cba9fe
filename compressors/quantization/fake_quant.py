"""Layers with fake quantization and learned scales; `compressors.quantization.prepare_bake` puts them into a model.

Codes and their gradients are those of `compressors.quantization.autograd`. Scales are learned as logarithms, so that
they stay positive.

A `QuantLinear` multiplies integer codes and applies both scales to the product,
``y = (codes(x) @ codes(W).T) * s_x * s_w + b``: the codes are exact in bfloat16, where ``code * scale`` is not, so a
mixed-precision forward pass multiplies the same integers as the exported engine. How exactly it adds them up,
`compressors.quantization.autograd.integer_sums` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from compressors.distributed import world_size
from compressors.projections import magnitude_scores, mse_scale, nm_mask
from compressors.quantization.autograd import (
    ACTIVATION_QMAX,
    ACTIVATION_QMIN,
    compute_dtype,
    fake_quantize,
    integer_product,
    learned,
    quantize,
    sr_ste_weight,
)
from compressors.quantization.observers import HistogramObserver
from nxm_export.contract.encoder_family import part_name
from nxm_export.contract.plan import WeightSpec


class ActivationQuantizer(nn.Module):
    """Static per-tensor symmetric INT8 quantizer with a learned scale; may be shared by several readers of one
    tensor."""

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
        """The scale as it will be deployed, float32 (1,)."""
        return self.log_scale.detach().float().exp()

    def set_scale(self, scale: float) -> None:
        """Set the scale, for example from calibration."""
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))

    def observe(self, x: Tensor) -> None:
        """Count the values of `x` (batch, sequence, features) that are not padding."""
        assert self.observer is not None
        self.observer.observe(x if self.token_mask is None else x[self.token_mask])

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scale) of `x`; computed once for all readers of the same tensor."""
        if self._cached is not None and self._cached[0] is x:
            result = self._cached[1]
        else:
            scale = self.scale_for(x)
            result = (quantize(x, scale, compute_dtype(x)), scale)
            self._cached, self._reads = (x, result), 0
        self._reads += 1
        if self._reads >= self.readers:
            self._cached = None
        return result

    def scale_for(self, x: Tensor) -> Tensor:
        """The scale (1,), its gradient damped for the size of the whole batch that `x` is of."""
        return learned(self.log_scale, x.numel() * world_size(), ACTIVATION_QMAX)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        if self.observer is not None:
            self.observe(x)
            return x
        return fake_quantize(x, self.scale_for(x), ACTIVATION_QMIN, ACTIVATION_QMAX)


class PartQuantizers(nn.ModuleDict):
    """Quantizers of what a fused matrix writes: one for each of its parts, whose channels are side by side."""

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__({part: ActivationQuantizer() for part in parts})

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x` (..., out), each part by its own scale."""
        channels = x.chunk(len(self), dim=-1)
        return torch.cat([quantizer(part) for quantizer, part in zip(self.values(), channels, strict=True)], dim=-1)


class QuantLinear(nn.Linear):
    """A linear layer under a `WeightSpec`: mask, weight codes and activation quantizers, all trainable through. A fused
    matrix has `parts`, by name, and an output quantizer for each.

    `mask` is None until it is fixed (`freeze_mask`); from then on it is fixed and nothing can revive a masked weight.
    `quantize_weight` is off in those ADMM modes that leave the weight in float. While `sr_ste_decay` is set (SR-STE)
    and the mask is not fixed, every forward pass uses the magnitude mask of the weight as it is.
    """

    mask: Tensor | None
    input_factors: Tensor | None

    output_quantizer: ActivationQuantizer | PartQuantizers | None

    def __init__(self, linear: nn.Linear, spec: WeightSpec, name: str, parts: Sequence[str] = ()) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.spec, self.name = spec, name
        self.quantize_weight = spec.weight_bits is not None
        self.register_buffer("mask", None)
        self._float_mask: Tensor | None = None
        self.sr_ste_decay: float | None = None
        self.importance: Tensor | None = None  # (in,) of each input, for the choice of masks; None = magnitude alone
        if spec.weight_bits:
            self.log_scale = nn.Parameter(torch.zeros(self.out_features, 1, device=self.weight.device))
            self.reset_scale()
        self.input_quantizer: ActivationQuantizer | None = None
        self._shared_input: list[ActivationQuantizer] = []  # a list, so that nn.Module does not register it twice
        self.output_quantizer = None
        if spec.output_bits:
            self.output_quantizer = PartQuantizers(parts) if parts else ActivationQuantizer()
        self.register_buffer("input_factors", None)  # (in,), see `even_out`
        self.residual_hooks: list[
            RemovableHandle
        ] = []  # handles of hooks outside this layer that use its input quantizer

    @property
    def reads(self) -> ActivationQuantizer | None:
        """The quantizer of the tensor that this layer reads, its own or a shared one."""
        return self._shared_input[0] if self._shared_input else self.input_quantizer

    def output_scales(self) -> dict[str, Tensor]:
        """The scales (1,) of its output quantizers, by the name of the weight or of its part."""
        if isinstance(self.output_quantizer, PartQuantizers):
            quantizers = cast(Iterable[tuple[str, ActivationQuantizer]], self.output_quantizer.items())
            return {part_name(self.name, part): quantizer.scale for part, quantizer in quantizers}
        return {} if self.output_quantizer is None else {self.name: self.output_quantizer.scale}

    def share_input(self, quantizer: ActivationQuantizer) -> None:
        """Read through a quantizer that another layer owns."""
        self._shared_input = [quantizer]
        quantizer.readers += 1

    @property
    def weight_scale(self) -> Tensor:
        """Deployed weight scale per output channel, float32 (out, 1)."""
        return self.log_scale.detach().float().exp()

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Set the weight scales to those of least squared error for the weight as it is."""
        assert self.spec.qmax is not None
        self.log_scale.copy_(mse_scale(self.weight.float(), self.spec.qmax).log())

    @torch.no_grad()
    def even_out(self, factors: Tensor) -> None:
        """Divide the channels of what this layer reads by `factors` (in,), and multiply its weight by them: it computes
        the same, until both are rounded. A hook divides, so that whatever watches the layer sees what it multiplies."""
        self.input_factors = factors
        self.weight.mul_(factors)
        if self.spec.weight_bits:
            self.reset_scale()
        self.register_forward_pre_hook(_divide)

    @torch.no_grad()
    def freeze_mask(self, scores: Tensor | None = None) -> None:
        """Fix the mask (the N highest `scores`, by default `magnitude_scores`, of each group), zero the rest, and refit
        the scales."""
        if self.spec.pattern:
            self.mask = nm_mask(self._scores() if scores is None else scores, self.spec.pattern)
            self._float_mask = None
            self.weight.mul_(self.mask)
        if self.spec.weight_bits:
            self.quantize_weight = True
            self.reset_scale()

    @torch.no_grad()
    def start_from(self, weight: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
        """Fix `mask`, and go on from this weight (out, in) and these scales (out, 1), as a solver gives them."""
        self.weight.copy_(weight)
        self.mask, self._float_mask = mask, None
        if scale is not None:
            self.quantize_weight = True
            self.log_scale.copy_(scale.log())

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
        codes, input_scale = quantizer.codes(x)
        weight_scale: Tensor | None = None
        if self.quantize_weight:
            assert self.spec.qmax is not None
            weight_scale = learned(self.log_scale, self.in_features, self.spec.qmax)  # (out, 1)
        mask = self._mask_as(self.weight.dtype)
        # As a plain layer's would be under autocast, which halves what the layers behind it keep for the way back; but
        # a quantizer reads it in float32, as engines do.
        dtype = codes.dtype if self.output_quantizer is None else torch.float32
        return integer_product(
            codes, input_scale, self._visible_weight(), weight_scale, self.bias, mask, self.spec.qmax or 0, dtype
        )

    def _float_weight(self) -> Tensor:
        mask = self._mask_as(self.weight.dtype)
        return self._visible_weight() if mask is None else self.weight * mask

    def _visible_weight(self) -> Tensor:
        """The weight, under its own magnitude mask while SR-STE looks for one."""
        if self.sr_ste_decay is None or self.mask is not None or self.spec.pattern is None:
            return self.weight
        mask = nm_mask(self._scores(), self.spec.pattern)
        return sr_ste_weight(self.weight, mask, self.sr_ste_decay)

    def _mask_as(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as 0 and 1 in `dtype`: products with boolean tensors are slow. Rebuilt when mask or device
        change."""
        if self.mask is None:
            return None
        if self._float_mask is None or self._float_mask.dtype != dtype or self._float_mask.device != self.mask.device:
            self._float_mask = self.mask.to(dtype)
        return self._float_mask

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


def _divide(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an evened-out layer reads, divided."""
    factors = cast(QuantLinear, layer).input_factors
    assert factors is not None
    return (args[0] / factors, *args[1:])


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The prepared layers of a model by weight name, in model order."""
    return {module.name: module for module in model.modules() if isinstance(module, QuantLinear)}


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """Every activation quantizer of a prepared model, each once."""
    return [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
