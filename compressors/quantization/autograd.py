"""The differentiable functions of fake quantization: codes, their integer product, and the gradients of values and steps.

Codes are ``k = clip(round(x / s), qmin, qmax)``, rounding half to even. The straight-through derivative of ``s * k``
is 1 for x inside the range and 0 outside; for the step it is ``k - x/s`` inside and ``k`` outside (LSQ: Esser et al.,
"Learned Step Size Quantization", ICLR 2020).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATION_QMIN, ACTIVATION_QMAX = -128, 127


class Codes(torch.autograd.Function):
    """Integer codes of an activation `x` for the step `scale` (1,), in `dtype`.

    The gradient that comes back is taken as that of the dequantized value ``codes * scale``, which is what `Product`
    returns: so no pass over the tensor is spent on multiplying by the step and dividing by it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.div(x.float(), scale).round_().clamp_(ACTIVATION_QMIN, ACTIVATION_QMAX).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        values = x.float()
        inside = _inside(grad.float(), values, scale, ACTIVATION_QMIN, ACTIVATION_QMAX)
        # How the range's width acts through the codes; how it acts through the product is `Product`'s part.
        grad_scale = -_dot(inside, values).div_(scale) if ctx.needs_input_grad[1] else None
        return inside.to(x.dtype), grad_scale, None


class FakeQuantize(torch.autograd.Function):
    """``clip(round(x / scale), qmin, qmax) * scale``, float32, for one step (1,) and a range of INT8.

    What is kept for the way back are `x` and the codes, a byte each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        found = torch.div(x.float(), scale).round_().clamp_(qmin, qmax)
        ctx.save_for_backward(x, scale, found.to(torch.int8))
        ctx.range = (qmin, qmax)
        return found.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, codes = ctx.saved_tensors
        values = x.float()
        inside = _inside(grad, values, scale, *ctx.range)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = _dot(grad, codes.to(grad.dtype)) - _dot(inside, values).div_(scale)
        return inside.to(x.dtype), grad_scale, None, None


class Product(torch.autograd.Function):
    """``(codes @ w.T) * step * scale + bias``, `dtype` (..., out): the integer product of a layer, scaled once in float32.

    `codes` (..., in) are `Codes` with their step `step` (1,). ``w`` are the integer codes of `weight` for the steps
    `scale` (out, 1) and ``[-qmax, qmax]``; or `weight` itself with `scale` None.

    `gate` (or None) is 1 for a kept weight and 0 for a masked one, and multiplies the gradient. It need not touch the
    codes: a masked weight is 0 when its mask is fixed, has no gradient from then on, and so stays 0, which
    `require_invariants` asserts.

    The gradients of all steps come out of sums over the weight, which is smaller than what a batch writes:
    ``sum_t g[t,o] * product[t,o] = sum_i w[o,i] * (g.T @ codes)[o,i]``, and the second factor is at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        step: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        qmax: int,
        dtype: torch.dtype,
    ) -> Tensor:
        if scale is None:
            multiplied, factor = weight if gate is None else weight * gate, step
        else:
            multiplied, factor = torch.div(weight, scale).round_().clamp_(-qmax, qmax), scale.squeeze(-1) * step
        multiplied = multiplied.to(codes.dtype)
        ctx.save_for_backward(codes, step, weight, scale, gate, multiplied)
        ctx.qmax, ctx.has_bias = qmax, bias is not None
        product = functional.linear(codes, multiplied).float()
        scaled = product.mul_(factor) if bias is None else torch.addcmul(bias, product, factor, out=product)
        return scaled.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, step, weight, scale, gate, multiplied = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_bias = rows.sum(dim=0, dtype=torch.float32) if ctx.has_bias else None
        rows = rows.to(codes.dtype)
        deployed = multiplied if scale is None else multiplied * scale.to(codes.dtype)
        grad_codes = (rows @ deployed).reshape(codes.shape)
        through = (rows.T @ codes.reshape(-1, codes.shape[-1])).float()  # (out, in): gradient of weight / step
        moment = torch.linalg.vecdot(through, multiplied.float())  # (out,)
        grad_weight, grad_scale = through.mul_(step), None
        if scale is None:
            grad_step = moment.sum().reshape(1)
        else:
            steps = scale.squeeze(-1)  # (out,)
            grad_step = torch.dot(moment, steps).reshape(1)
            limit = float(ctx.qmax)
            grad_weight = torch.ops.aten.hardtanh_backward(grad_weight, torch.div(weight, scale), -limit, limit)
            grad_scale = (moment * step - torch.linalg.vecdot(grad_weight, weight) / steps).unsqueeze(-1)
        if gate is not None:
            grad_weight = grad_weight.mul_(gate)
        return grad_codes, grad_step, grad_weight, grad_scale, grad_bias, None, None, None


def _inside(grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """`grad` where ``qmin < x / scale < qmax``, else 0: the derivative of clipping, float32.

    By the one vectorized kernel that has it; selecting with boolean masks takes ten times as long on CPUs.
    """
    if scale.device.type == "cpu":  # reading the step costs nothing here, and the division is a pass over the tensor
        step = float(scale)
        return torch.ops.aten.hardtanh_backward(grad, x, qmin * step, qmax * step)
    return torch.ops.aten.hardtanh_backward(grad, torch.div(x, scale), float(qmin), float(qmax))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products of two tensors of one shape, (1,)."""
    return torch.dot(a.flatten(), b.flatten()).reshape(1)


class FollowedMask(torch.autograd.Function):
    """``weight * mask`` whose gradient reaches masked weights, too, and pulls them to 0: ``g + decay * (1 - mask) * weight``.

    SR-STE: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
