"""Fake quantization against integer arithmetic and against autograd of its definition."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressors.models import load_model, resolve
from compressors.projections import mse_scale, nm_mask
from compressors.quantization.autograd import fake_quantize
from compressors.quantization.fake_quant import (
    ActivationQuantizer,
    PartQuantizers,
    QuantLinear,
    activation_quantizers,
    quant_linears,
)
from compressors.quantization.observers import HistogramObserver
from compressors.quantization.prepare_bake import bake, calibrate, prepare, require_invariants
from compressors.settings import Settings
from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError, DataError, PlanError
from tests.support import tiny

W4 = WeightSpec(NMPattern(2, 4), 4, 8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


class Block(nn.Module):
    """A stand-in with the module names of one BERT block; only the linear layers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = nn.Module()
        self.bert.encoder = nn.Module()
        layer = nn.Module()
        layer.attention = nn.Module()
        layer.attention.self = nn.Module()
        layer.attention.output = nn.Module()
        layer.intermediate, layer.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            setattr(layer.attention.self, name, nn.Linear(8, 8))
        layer.attention.output.dense = nn.Linear(8, 8)
        layer.intermediate.dense, layer.output.dense = nn.Linear(8, 16), nn.Linear(16, 8)
        self.bert.encoder.layer = nn.ModuleList([layer])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        layer: Any = self.bert.encoder.layer[0]  # type: ignore[index, union-attr]  # of modules put together here
        x = torch.stack([input_ids.float() * (i + 1) for i in range(8)], dim=-1)
        attended = layer.attention.self
        x = layer.attention.output.dense(attended.query(x) + attended.key(x) + attended.value(x))
        return cast(Tensor, layer.output.dense(layer.intermediate.dense(x).relu()))


CONFIG = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
FAMILY = FAMILIES["bert"]


def test_query_key_and_value_share_one_quantizer_that_runs_once() -> None:
    model = Block()
    prepare(model, FAMILY.uniform_plan(CONFIG, W4, placement="inputs"), FAMILY, CONFIG)
    layers = list(quant_linears(model).values())
    shared = layers[0].reads
    assert shared is not None
    assert [layer.reads is shared for layer in layers] == [True, True, True, False, False, False]
    assert len(activation_quantizers(model)) == 4
    assert shared.readers == 3
    names = [name for name, _ in model.named_parameters() if "input_quantizer" in name]
    assert len(names) == 4  # saved once, not three times
    x = randn(2, 8)
    first, second = shared.codes(x), shared.codes(x)
    assert first[0] is second[0]
    shared.codes(x)  # the third reader
    assert shared._cached is None  # and nothing is kept after it


def test_prepare_and_bake_undo_each_other() -> None:
    model = Block()
    before = copy.deepcopy(model.state_dict())
    plan = FAMILY.uniform_plan(CONFIG, WeightSpec(None, 8, 8))
    prepare(model, plan, FAMILY, CONFIG)
    scales = bake(model, plan)
    assert set(model.state_dict()) == set(before)
    assert all(type(module) is not QuantLinear for module in model.modules())
    for name, tensor in model.state_dict().items():
        step = scales[f"{name}_scale"][:, None] if f"{name}_scale" in scales else np.zeros((1, 1))
        # A weight moves by half a step at most, plus what clipping at a fitted scale takes.
        assert np.abs((tensor - before[name]).numpy()).max() <= 0.51 * np.max(step) + 1e-7
    assert sorted(kind.rpartition(".")[2] for kind in scales).count("output_scale") == 5


def test_calibration_ignores_padding() -> None:
    model = Block()
    prepare(model, FAMILY.uniform_plan(CONFIG, W4, placement="inputs"), FAMILY, CONFIG)
    ids = torch.tensor([[1, 2, 1000], [2, 1, 1000]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    calibrate(model, [{"input_ids": ids, "attention_mask": mask}], 100.0)
    actual = float(activation_quantizers(model)[0].scale) * 127
    assert actual == pytest.approx(
        2 * 8, rel=1e-3
    )  # the largest real value is 2 times the factor 8; padding holds 8000


def test_percentile_of_a_stream_matches_numpy_and_needs_no_more_memory() -> None:
    observer, chunks = HistogramObserver(), [randn(1000, seed=i) * (i + 1) for i in range(20)]
    for chunk in chunks:
        observer.observe(chunk)
    assert observer.counts is not None
    assert observer.counts.numel() == 4096
    values = torch.cat(chunks).abs().numpy()
    for q in (50.0, 99.0, 99.9, 100.0):
        actual = observer.percentile(q)
        # At least q percent lie at or below it, and no longer one histogram bin further down.
        assert (values <= actual * (1 + 1e-6)).mean() >= q / 100
        assert (values <= actual - 1.001 * observer.limit / 4096).mean() <= q / 100


def squared_error(values: Tensor, scale: float) -> float:
    codes = (values.double() / scale).round().clamp(-128, 127)
    return float((codes * scale - values.double()).square().sum())


@settings(max_examples=40, deadline=None)
@given(
    rare=st.integers(0, 40), size=st.floats(1.0, 500.0), chunks=st.integers(1, 5), seed=st.integers(0, 10)
)  # some of 20,000 values are far larger than the others, as in what encoders compute
def test_the_scale_of_least_error_is_that_of_a_search_over_the_values_themselves(
    rare: int, size: float, chunks: int, seed: int
) -> None:
    values = randn(20_000, seed=seed)
    values[torch.randperm(20_000, generator=torch.Generator().manual_seed(seed))[:rare]] *= size
    observer = HistogramObserver()
    for chunk in values.chunk(chunks):
        observer.observe(chunk)
    chosen = squared_error(values, observer.scale(127, None))
    tried = np.linspace(0.1, 1.0, 200) * float(values.abs().max()) / 127
    # The histogram has 2048 bins or more up to the largest value: at least 16 of them to a step.
    assert chosen <= 1.05 * min(squared_error(values, float(scale)) for scale in tried)


def test_a_percentile_cuts_off_what_a_few_tokens_carry_and_least_error_does_not() -> None:
    values = randn(100_000)
    values[:9] = 60.0  # fewer than one in ten thousand
    observer = HistogramObserver()
    observer.observe(values)
    assert observer.scale(127, 99.99) * 127 < 6
    assert observer.scale(127, None) * 127 > 55


def test_more_values_than_float32_counts_are_counted() -> None:
    observer, values = HistogramObserver(), torch.zeros(2**24 + 4096)
    values[0] = 1.0
    observer.observe(values)
    assert observer.counts is not None
    assert int(observer.counts.sum()) == len(values)


def test_zeros_alone_have_a_scale() -> None:
    observer = HistogramObserver()
    observer.observe(torch.zeros(4))
    assert observer.scale(127, None) > 0


def test_ranges_are_of_least_error_where_no_training_moves_them() -> None:
    assert [Settings(steps=0).range_percentile, Settings(recipe="one-shot").range_percentile] == [None, None]
    assert Settings(steps=5).range_percentile == Settings().range_percentile == 99.99
    assert Settings(steps=0, percentile=99.0).range_percentile == Settings(percentile=99.0).range_percentile == 99.0


def test_calibration_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match="saw no activation"):
        HistogramObserver().scale(127, 99)
    with pytest.raises(DataError, match="saw no activation"):
        HistogramObserver().scale(127, None)
    with pytest.raises(DataError, match="NaN or infinite"):
        HistogramObserver().observe(torch.tensor([1.0, float("nan")]))


def test_int8_attention_needs_quantized_queries_keys_and_values() -> None:
    plan = replace(FAMILY.uniform_plan(CONFIG, W4, placement="inputs"), attention="int8")
    with pytest.raises(PlanError, match="needs output_bits 8 on every query, key and value"):
        prepare(Block(), plan, FAMILY, CONFIG)


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


def test_a_fused_matrix_leaves_a_scale_for_each_part_and_attention_quantizes_what_is_rotated(tmp_path: Path) -> None:
    path = tiny.write_model("modernbert", tmp_path, head="classification", layers=1)
    model = load_model(resolve(path), TASKS["classification"])
    family, config = FAMILIES["modernbert"], read_config(tmp_path)
    plan = family.uniform_plan(config, WeightSpec.parse("W8"), placement="attention")
    prepare(model, plan, family, config)
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], 100.0)
    scales = bake(model, plan)
    block = "model.layers.0"
    written = {name.removeprefix(f"{block}.") for name in scales if not name.endswith((".input_scale", "weight_scale"))}
    assert written == {
        *(f"attn.Wqkv.{part}.output_scale" for part in ("query", "key", "value")),
        *(f"mlp.Wi.{part}.output_scale" for part in ("input", "gate")),
        *("attn.Wo.output_scale", "mlp.Wo.output_scale", "attn.query_scale", "attn.key_scale"),
    }
    assert all(scale.shape == () and scale > 0 for name, scale in scales.items() if not name.endswith("weight_scale"))
    assert not quant_linears(model)
    assert not activation_quantizers(model)


def test_attention_inside_a_module_of_its_own_multiplies_quantized_probabilities(tmp_path: Path) -> None:
    path = tiny.write_model("mpnet", tmp_path, head="classification", layers=1)
    model = load_model(resolve(path), TASKS["classification"])
    family, config = FAMILIES["mpnet"], read_config(tmp_path)
    prepare(model, family.uniform_plan(config, WeightSpec.parse("W8"), placement="products"), family, config)
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calibrate(model, [batch], 100.0)
    read: list[Tensor] = []
    dropout = model.get_submodule("mpnet.encoder.layer.0.attention.attn.dropout")
    dropout.register_forward_hook(lambda module, args, output: read.append(args[0]))
    model(**batch).logits.square().sum().backward()
    codes = 127 * read[0].detach().numpy()
    np.testing.assert_allclose(codes, codes.round(), rtol=0, atol=1e-4)
    assert len(np.unique(codes.round())) > 3
    gradient = quant_linears(model)["mpnet.encoder.layer.0.attention.attn.q.weight"].weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0  # they have a gradient
