"""Fake quantization against integer arithmetic and against autograd of its definition."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressors.projections import mse_scale, nm_mask
from compressors.quantization.autograd import fake_quantize
from compressors.quantization.fake_quant import (
    ActivationQuantizer,
    PartQuantizers,
    QuantLinear,
    activation_quantizers,
)
from compressors.quantization.prepare_bake import require_invariants
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.errors import ArtifactError
from tests.support.random_tensors import randn

W4 = WeightSpec(NMPattern(2, 4), 4, 8)


def definition(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """The straight-through definition, left to autograd: clip first, then round with gradient one."""
    v = x / scale
    clipped = v.clamp(qmin, qmax)
    return clipped + (v.round().clamp(qmin, qmax) - clipped).detach()


@pytest.mark.parametrize("limits", [(-128, 127), (-7, 7)])
def test_values_and_gradients_are_those_of_the_definition(limits: tuple[int, int]) -> None:
    upstream = randn(3, 5, 8, seed=3)
    results = []

    def by_definition(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        return definition(x, scale, qmin, qmax) * scale

    for function in (by_definition, fake_quantize):
        x = (randn(3, 5, 8, seed=1) * 3).requires_grad_()
        scale = torch.full((1,), 0.3 if limits[1] == 7 else 0.02).requires_grad_()
        actual = function(x, scale, *limits)
        torch.autograd.backward((actual * upstream).sum())
        results.append((actual.detach(), x.grad, scale.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # sums in another order
    assert (results[0][0].abs() >= limits[1] * 0.02).any()  # some values were clipped, so that case is tested


def quantized_layer(spec: WeightSpec = W4, out: int = 12, in_: int = 16, bias: bool = True) -> QuantLinear:
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(in_, out, bias=bias), spec, "x.weight")
    if spec.input_bits:
        layer.input_quantizer = ActivationQuantizer()
        layer.input_quantizer.set_scale(0.02)
    return layer


def by_autograd(layer: QuantLinear, x: Tensor) -> Tensor:
    """What a layer computes, from the definition of fake quantization and nothing else."""

    def learned(log_scale: Tensor, elements: int, qmax: int) -> Tensor:
        damping = (elements * qmax) ** -0.5
        damped: Tensor = log_scale * damping + (log_scale * (1 - damping)).detach()
        return damped.exp()

    assert layer.input_quantizer is not None
    step = learned(layer.input_quantizer.log_scale, x.numel(), 127)
    weight = layer.weight if layer.mask is None else layer.weight * layer.mask
    if layer.quantize_weight:
        scale = learned(layer.log_scale, layer.in_features, layer.spec.qmax)  # type: ignore[arg-type]
        weight = definition(weight, scale, -layer.spec.qmax, layer.spec.qmax) * scale  # type: ignore[operator, arg-type]
    return torch.nn.functional.linear(definition(x, step, -128, 127) * step, weight, layer.bias)


def outputs_and_gradients(layer: QuantLinear, x: Tensor, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(x)
    torch.autograd.backward((y * randn(*y.shape, seed=5)).sum())
    assert x.grad is not None
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", ["hardened", "before hardening", "weight in float"])
def test_every_gradient_of_a_layer_is_that_of_the_definition(bits: int, bias: bool, state: str) -> None:
    layer = quantized_layer(WeightSpec(NMPattern(2, 4), bits, 8), bias=bias)
    if state == "hardened":
        layer.freeze_mask()
    layer.quantize_weight = state != "weight in float"
    with torch.no_grad():
        layer.log_scale.sub_(0.4)  # narrower than fitted, so that weights are clipped, too
    x = randn(5, 3, 16, seed=4)
    expected = outputs_and_gradients(layer, x, lambda x: by_autograd(layer, x))
    actual = outputs_and_gradients(layer, x, layer)
    assert actual.keys() == expected.keys()
    assert {"weight", "input_quantizer.log_scale"} <= actual.keys()
    for name in expected:  # sums in another order
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_gradients_under_bfloat16_are_as_good_as_those_of_a_plain_layer() -> None:
    layer, plain = quantized_layer(WeightSpec(NMPattern(2, 4), 4, 8), 64, 128), nn.Linear(128, 64)
    layer.freeze_mask()
    x = randn(40, 128, seed=4)

    def error(module: nn.Module) -> dict[str, float]:
        exact = outputs_and_gradients(module, x, module)  # type: ignore[arg-type]

        def mixed(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return cast(Tensor, module(x))

        rounded = outputs_and_gradients(module, x, mixed)  # type: ignore[arg-type]
        return {name: float((rounded[name] - exact[name]).norm() / exact[name].norm()) for name in exact}

    with torch.autocast("cpu", torch.bfloat16):
        # As a plain layer's, unless a quantizer reads it: engines do that in float32.
        assert layer(x).dtype == plain(x).dtype == torch.bfloat16
        assert (
            quantized_layer(WeightSpec(NMPattern(2, 4), 4, 8, 8), 64, 128)._product(x, layer.reads).dtype
            == torch.float32
        )
    ours, theirs = error(layer), error(plain)
    for name in theirs:
        assert ours[name] <= 1.5 * theirs[name] + 1e-6  # bfloat16 keeps 8 bits, whose rounding is the same for both
    for name in ours.keys() - theirs.keys():  # steps: sums of many products, each rounded
        assert ours[name] < 0.02


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_integer_arithmetic(bits: int, bias: bool) -> None:
    layer = quantized_layer(WeightSpec(NMPattern(2, 4), bits, 8), bias=bias)
    layer.freeze_mask()
    x = randn(5, 3, 16)
    xq = np.clip(np.rint((x / 0.02).numpy()), -128, 127).astype(np.int64)
    scale = layer.weight_scale.numpy()
    wq = np.clip(np.rint(layer.weight.detach().numpy() / scale), -layer.spec.qmax, layer.spec.qmax).astype(np.int64)  # type: ignore[operator]
    assert (np.abs(wq).reshape(12, 4, 4) > 0).sum(axis=-1).max() <= 2
    expected = (xq @ wq.T) * (0.02 * scale.squeeze(-1))
    if bias:
        expected = expected + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_multiplies_the_same_integers() -> None:
    layer = quantized_layer()
    layer.freeze_mask()
    x = randn(7, 16)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x).float()
    # The codes are exact in bfloat16; only the product is rounded, to 8 bits of mantissa.
    torch.testing.assert_close(mixed, exact, rtol=2**-8, atol=2**-8 * float(exact.detach().abs().max()))
    rounded = torch.nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()
    assert (mixed - exact).abs().mean() < (rounded - exact).abs().mean()


def test_masked_weights_stay_zero_through_any_training() -> None:
    torch.manual_seed(0)
    for spec in (W4, WeightSpec(NMPattern(2, 4)), WeightSpec(NMPattern(1, 4), 8, 8)):
        layer = quantized_layer(spec)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
        for step in range(30):
            if step == 10:
                layer.freeze_mask()  # momentum of ten dense steps is still in the optimizer ...
                optimizer = torch.optim.AdamW(
                    layer.parameters(), lr=0.05, weight_decay=0.1
                )  # ... so a phase starts anew
            optimizer.zero_grad()
            layer(randn(9, 16, seed=step)).square().sum().backward()
            optimizer.step()
            if step >= 10:
                require_invariants(layer)
        assert layer.mask is not None
        assert (layer.weight.detach()[layer.mask] != 0).all()


def test_sr_ste_follows_the_weight_and_its_gradient_is_the_definition() -> None:
    layer = quantized_layer(WeightSpec(NMPattern(2, 4)), bias=False)
    layer.sr_ste_decay = 0.5
    x, upstream = randn(3, 16, seed=1), randn(3, 12, seed=2)
    mask = nm_mask(layer.weight.detach().abs(), NMPattern(2, 4))
    output = layer(x)
    torch.testing.assert_close(output, x @ (layer.weight * mask).T)
    (output * upstream).sum().backward()
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x + 0.5 * layer.weight.detach() * ~mask)
    with torch.no_grad():  # the smallest of the first group becomes its largest, and is in at the next pass
        layer.weight[0, int(layer.weight[0, :4].abs().argmin())] = 9.0
    torch.testing.assert_close(layer(x)[:, 0], x @ (layer.weight * nm_mask(layer.weight.abs(), NMPattern(2, 4)))[0])
    layer.freeze_mask()
    layer(x).sum().backward()
    require_invariants(layer)


def test_a_layer_begins_with_the_scales_of_its_weight_and_fixing_its_mask_fits_them_anew() -> None:
    layer = quantized_layer()
    assert layer.quantize_weight
    assert not quantized_layer(WeightSpec(NMPattern(2, 4))).quantize_weight
    torch.testing.assert_close(layer.weight_scale, mse_scale(layer.weight.detach(), 7))
    with torch.no_grad():
        layer.weight.mul_(3.0)
    layer.quantize_weight = False
    layer.freeze_mask()
    assert layer.quantize_weight
    assert layer.mask is not None
    assert torch.equal(layer.mask, nm_mask(layer.weight.detach().abs(), NMPattern(2, 4)))
    torch.testing.assert_close(layer.weight_scale, mse_scale(layer.weight.detach(), 7))
    other = quantized_layer()
    other.freeze_mask(-other.weight.detach().abs())
    assert other.mask is not None
    assert not (other.mask & layer.mask).any(), "by the scores that are given"
    dense = quantized_layer(WeightSpec(None, 4, 8))
    dense.freeze_mask()
    assert dense.mask is None


def test_a_layer_goes_on_from_what_a_solver_gives() -> None:
    layer = quantized_layer()
    layer.freeze_mask()
    layer(randn(2, 16))  # the mask is kept in float
    before, mask = layer.weight_scale, nm_mask(randn(12, 16, seed=3), NMPattern(2, 4))
    weight, scale = randn(12, 16, seed=4) * mask, torch.rand(12, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    layer.quantize_weight = False
    layer.start_from(weight, mask, None)
    assert not layer.quantize_weight
    assert torch.equal(layer.weight_scale, before)
    layer.start_from(weight, mask, scale)
    assert layer.quantize_weight
    torch.testing.assert_close(layer.weight_scale, scale)
    expected = torch.round(weight / scale).clamp(-7, 7) * scale
    torch.testing.assert_close(layer.baked()[0], expected)
    layer.input_quantizer = None
    torch.testing.assert_close(layer(torch.eye(16)) - layer.bias, weight.T)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_fixed_mask_holds_for_weights_that_move_and_for_other_types(bits: int | None) -> None:
    """In float, what momentum does to a masked weight changes nothing. Moved to another type, it masks in that type."""
    layer = quantized_layer(WeightSpec(NMPattern(2, 4), bits, 8 if bits else None))
    layer.sr_ste_decay = 0.5
    layer.freeze_mask()
    assert layer.mask is not None
    x = randn(5, 16)
    before = layer(x).detach()
    with torch.no_grad():
        layer.weight[~layer.mask] = 0.0 if bits else 5.0
    torch.testing.assert_close(layer(x), before)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad[~layer.mask] == 0).all(), "the decay of SR-STE ends where the mask is fixed"
    double = layer.double()
    assert double(x.double()).dtype == (torch.float32 if bits else torch.float64)
    torch.testing.assert_close(double(x.double()).float(), before)


def test_another_tensor_is_never_given_the_codes_of_the_one_before() -> None:
    quantizer = ActivationQuantizer()
    quantizer.set_scale(0.5)
    quantizer.readers = 3
    for value in (1.0, 2.0, 2.0, 3.0, 3.0, 3.0):
        codes, scale = quantizer.codes(torch.full((2, 2), value))
        assert (codes * scale == value).all()


def test_the_gradient_of_a_shared_step_is_damped_for_the_batch_of_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, gradients = randn(6, 8), []
    for processes in (1, 4):
        monkeypatch.setattr("compressors.quantization.fake_quant.world_size", lambda count=processes: count)
        quantizer = ActivationQuantizer()
        quantizer.set_scale(0.02)
        quantizer(x).square().sum().backward()
        assert quantizer.log_scale.grad is not None
        gradients.append(float(quantizer.log_scale.grad))
    assert gradients[1] == pytest.approx(gradients[0] / 2)  # 1 / sqrt(4)


@pytest.mark.parametrize("bits", [None, 4])
def test_evening_out_changes_nothing_but_what_is_rounded(bits: int | None) -> None:
    layer = quantized_layer(WeightSpec(None, bits, 8) if bits else WeightSpec(NMPattern(2, 4)))
    layer.quantize_weight, layer.input_quantizer = False, None
    x, factors = randn(5, 16), torch.rand(16, generator=torch.Generator().manual_seed(2)) + 0.5
    before, weight = layer(x).detach(), layer.weight.detach().clone()
    seen: list[Tensor] = []
    layer.even_out(factors)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(seen[0], x / factors)
    torch.testing.assert_close(layer.weight.detach(), weight * factors)
    if bits:
        torch.testing.assert_close(layer.weight_scale, mse_scale(weight * factors, 7))


def test_a_revived_weight_is_noticed() -> None:
    layer = quantized_layer()
    layer.freeze_mask()
    assert layer.mask is not None
    with torch.no_grad():
        layer.weight[~layer.mask] = 0.5
    with pytest.raises(ArtifactError, match=r"x\.weight: 96 masked weights came back to life"):
        require_invariants(layer)


@pytest.mark.parametrize("bits", [2, 4, 8, None])
def test_baked_weights_lie_on_pattern_and_grid_exactly(bits: int | None) -> None:
    layer = quantized_layer(WeightSpec(NMPattern(2, 4), bits, 8 if bits else None))
    layer.freeze_mask()
    weight, scale = layer.baked()
    assert ((weight != 0).reshape(12, 4, 4).sum(-1) <= 2).all()
    if bits is None:
        assert scale is None
        return
    assert scale is not None
    codes = (weight / scale[:, None]).round()
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(codes * scale[:, None], weight)


def test_every_part_of_a_fused_matrix_is_rounded_by_a_scale_of_its_own() -> None:
    torch.manual_seed(0)
    parts = ("query", "key", "value")
    layer = QuantLinear(nn.Linear(8, 12), WeightSpec(weight_bits=8, input_bits=8, output_bits=8), "a.b.weight", parts)
    layer.input_quantizer = ActivationQuantizer()
    layer.input_quantizer.set_scale(0.02)
    assert isinstance(layer.output_quantizer, PartQuantizers)
    quantizers, scales = activation_quantizers(layer.output_quantizer), (0.5, 0.03, 0.004)
    for quantizer, scale in zip(quantizers, scales, strict=True):
        quantizer.set_scale(scale)
    x = randn(2, 5, 8, seed=1)
    y = layer(x)
    layer.output_quantizer = None
    expected = [
        definition(part, torch.tensor(scale), -128, 127) * scale
        for part, scale in zip(layer(x).split(4, dim=-1), scales, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat(expected, dim=-1), rtol=1e-6, atol=1e-6)
    assert len({float(part.abs().max()) for part in expected}) == 3  # the scales are too unlike to be mixed up
    torch.autograd.backward(y.square().sum())
    assert all(quantizer.log_scale.grad is not None for quantizer in quantizers)
