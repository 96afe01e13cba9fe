"""The differentiable functions of fake quantization: codes, their integer product, and the gradients of values and
scales.

Codes are ``k = clip(round(x / s), qmin, qmax)``, rounding half to even. The straight-through derivative of ``s * k``
is 1 for x inside the range and 0 outside; for the scale it is ``k - x/s`` inside and ``k`` outside (LSQ: Esser et al.,
"Learned Step Size Quantization", ICLR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATION_QMIN, ACTIVATION_QMAX = -128, 127


class _Ctx(Protocol):
    """What autograd hands from a forward pass to its backward pass; the functions here add attributes of their own."""

    needs_input_grad: tuple[bool, ...]
    range: tuple[int, int]
    qmax: int
    has_bias: bool
    decay: float

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass."""


class FunctionCtx(_Ctx, Protocol):
    """Of a function all of whose tensors are there."""

    saved_tensors: tuple[Tensor, ...]


class ProductCtx(_Ctx, Protocol):
    """Of `IntegerProduct`: codes, their scale, the weight, its scales, its mask, and what was multiplied."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


class Codes(torch.autograd.Function):
    """Integer codes of an activation `x` for the `scale` (1,), in `dtype`.

    The gradient that comes back is taken as that of the dequantized value ``codes * scale``, which is what
    `IntegerProduct` returns: so no pass over the tensor is spent on multiplying by the scale and dividing by it again.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.div(x.float(), scale).round_().clamp_(ACTIVATION_QMIN, ACTIVATION_QMAX).to(dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        values = x.float()
        inside = _inside(grad.float(), values, scale, ACTIVATION_QMIN, ACTIVATION_QMAX)
        # How the range's width acts through the codes; how it acts through the product is `IntegerProduct`'s part.
        grad_scale = -_dot(inside, values).div_(scale) if ctx.needs_input_grad[1] else None
        return inside.to(x.dtype), grad_scale, None


class FakeQuantize(torch.autograd.Function):
    """``clip(round(x / scale), qmin, qmax) * scale``, float32, for one `scale` (1,) and a range of INT8.

    What is kept for the way back are `x` and the codes, a byte each.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        codes = torch.div(x.float(), scale).round_().clamp_(qmin, qmax)
        ctx.save_for_backward(x, scale, codes.to(torch.int8))
        ctx.range = (qmin, qmax)
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, codes = ctx.saved_tensors
        values = x.float()
        inside = _inside(grad, values, scale, *ctx.range)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = _dot(grad, codes.to(grad.dtype)) - _dot(inside, values).div_(scale)
        return inside.to(x.dtype), grad_scale, None, None


class IntegerProduct(torch.autograd.Function):
    """``(codes @ w.T) * input_scale * weight_scale + bias``, `dtype` (..., out): a layer's integer product, scaled once
    in float32.

    `codes` (..., in) are `Codes` with their `input_scale` (1,). ``w`` are the integer codes of `weight` for the scales
    `weight_scale` (out, 1) and ``[-qmax, qmax]``; or `weight` itself with `weight_scale` None.

    `nonzero_mask` (or None) is 1 for a weight that stays and 0 for a masked one, and multiplies the gradient. It need
    not touch the codes: a masked weight is 0 when its mask is fixed, has no gradient from then on, and so stays 0,
    which `require_invariants` asserts.

    The gradients of all scales come out of sums over the weight, which is smaller than what a batch writes:
    ``sum_t g[t,o] * product[t,o] = sum_i w[o,i] * (g.T @ codes)[o,i]``, and the second factor is at hand.
    """

    @staticmethod
    def forward(
        ctx: ProductCtx,
        codes: Tensor,
        input_scale: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None,
        bias: Tensor | None,
        nonzero_mask: Tensor | None,
        qmax: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """(Eight inputs: autograd takes them one by one.)"""
        if weight_scale is None:
            multiplied, factor = weight if nonzero_mask is None else weight * nonzero_mask, input_scale
        else:
            multiplied = torch.div(weight, weight_scale).round_().clamp_(-qmax, qmax)
            factor = weight_scale.squeeze(-1) * input_scale
        multiplied = multiplied.to(codes.dtype)
        ctx.save_for_backward(codes, input_scale, weight, weight_scale, nonzero_mask, multiplied)
        ctx.qmax, ctx.has_bias = qmax, bias is not None
        product = integer_sums(codes, multiplied)
        scaled = product.mul_(factor) if bias is None else torch.addcmul(bias, product, factor, out=product)
        return scaled.to(dtype)

    @staticmethod
    def backward(ctx: ProductCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, input_scale, weight, weight_scale, nonzero_mask, multiplied = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_bias = rows.sum(dim=0, dtype=torch.float32) if ctx.has_bias else None
        rows = rows.to(codes.dtype)
        deployed = multiplied if weight_scale is None else multiplied * weight_scale.to(codes.dtype)
        grad_codes = (rows @ deployed).reshape(codes.shape)
        through = (rows.T @ codes.reshape(-1, codes.shape[-1])).float()  # (out, in): gradient of weight / input_scale
        sums = torch.linalg.vecdot(through, multiplied.float())  # (out,)
        grad_weight, grad_weight_scale = through.mul_(input_scale), None
        if weight_scale is None:
            grad_input_scale = sums.sum().reshape(1)
        else:
            scales = weight_scale.squeeze(-1)  # (out,)
            grad_input_scale = torch.dot(sums, scales).reshape(1)
            limit = float(ctx.qmax)
            grad_weight = torch.ops.aten.hardtanh_backward(grad_weight, torch.div(weight, weight_scale), -limit, limit)
            through_codes = torch.linalg.vecdot(grad_weight, weight) / scales
            grad_weight_scale = (sums * input_scale - through_codes).unsqueeze(-1)
        if nonzero_mask is not None:
            grad_weight = grad_weight.mul_(nonzero_mask)
        return grad_codes, grad_input_scale, grad_weight, grad_weight_scale, grad_bias, None, None, None


def integer_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """``codes @ weight.T``, float32 (..., out), of `codes` (..., in) and `weight` (out, in) in one dtype.

    CUDA adds products of bfloat16 in float32, and gives them so. A CPU rounds these sums to bfloat16: .17 % off, root
    mean square, whatever the number of inputs.
    """
    if codes.device.type == "cuda" and codes.dtype != torch.float32:
        rows = codes.reshape(-1, codes.shape[-1])
        return torch.mm(rows, weight.t(), out_dtype=torch.float32).reshape(*codes.shape[:-1], len(weight))
    return functional.linear(codes, weight).float()


def _inside(grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """`grad` where ``qmin < x / scale < qmax``, else 0: the derivative of clipping, float32.

    By the one vectorized kernel that has it; selecting with boolean masks takes ten times as long on CPUs.
    """
    if scale.device.type == "cpu":  # reading the scale costs nothing here, and the division is a pass over the tensor
        factor = float(scale)
        inside: Tensor = torch.ops.aten.hardtanh_backward(grad, x, qmin * factor, qmax * factor)
    else:
        inside = torch.ops.aten.hardtanh_backward(grad, torch.div(x, scale), float(qmin), float(qmax))
    return inside


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products of two tensors of one shape, (1,)."""
    return torch.dot(a.flatten(), b.flatten()).reshape(1)


class SrSteMask(torch.autograd.Function):
    """``weight * mask`` whose gradient reaches masked weights, too, and pulls them to 0:
    ``g + decay * (1 - mask) * weight``.

    SR-STE: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * (weight * ~mask), None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of `x` are computed in here: autocast's, or float32."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def learned(log_scale: Tensor, elements: int, qmax: int) -> Tensor:
    """exp(log_scale), with the gradient damped by LSQ's 1/sqrt(elements * qmax)."""
    damping = 1.0 / math.sqrt(elements * qmax)
    damped = log_scale * damping
    return (damped + (log_scale - damped).detach()).exp()


# The functions with their types, which autograd's `apply` has not.
quantize: Callable[[Tensor, Tensor, torch.dtype], Tensor] = Codes.apply
fake_quantize: Callable[[Tensor, Tensor, int, int], Tensor] = FakeQuantize.apply
integer_product: Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, torch.dtype], Tensor
] = IntegerProduct.apply
sr_ste_weight: Callable[[Tensor, Tensor, float], Tensor] = SrSteMask.apply
