"""Ways to start from that were tried beside `compressors.pruning.layerwise.SOLVERS`: what lost lives here, and nowhere
else. `tools.experiments.layerwise_ablation` runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from compressors.projections import nm_mask
from compressors.pruning import layerwise
from compressors.pruning.layer_inputs import Batches, second_moments
from compressors.pruning.layerwise import (
    ADMM,
    MAGNITUDE,
    REFITTED,
    SECOND_ORDER,
    OutputMetric,
    Solution,
    Solver,
    metrics,
    refit,
    round_to_least_error,
    solve_layers,
    weighted_scale,
)
from compressors.quantization.fake_quant import QuantLinear
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.hf.protocols import TaskOutput


@dataclass
class Inputs:
    """What the layers of a model read while no weight is changed, as it was asked for: no option of a weight changes
    that, so that all options and variants share it."""

    plain: dict[str, OutputMetric] = field(default_factory=dict)
    centred: dict[str, tuple[OutputMetric, Tensor]] = field(default_factory=dict)  # with the mean input, (in,)
    weighted: dict[str, Tensor] = field(default_factory=dict)  # moments (in, in) by the squared gradients of tokens


@dataclass(frozen=True)
class Prepared:
    """A model with quantizers, the dense one, the samples that both read, and what is known of its inputs."""

    student: nn.Module
    dense: nn.Module
    blocks: Sequence[Mapping[str, QuantLinear]]
    batches: Batches
    inputs: Inputs = field(default_factory=Inputs)

    @property
    def layers(self) -> dict[str, QuantLinear]:
        return {name: layer for block in self.blocks for name, layer in block.items()}

    def metric(self, name: str) -> OutputMetric:
        """Of what a layer reads while no weight is changed."""
        known = self.inputs.plain
        if name not in known:
            for layer in self.layers.values():
                layer.quantize_weight = False
            for block in self.blocks:
                known.update(metrics(second_moments(self.student, block, self.batches)))
        return known[name]


Variant = Callable[[Prepared], Sequence[float]]  # compresses the student; returns the errors of its layers


LayerSolver = Callable[[Tensor, OutputMetric, WeightSpec], Solution]


def by_solver(solver: LayerSolver) -> Variant:
    """All layers for the inputs that they have while no weight is changed."""

    @torch.no_grad()
    def variant(prepared: Prepared) -> Sequence[float]:
        return [
            _start(layer, solver(layer.weight.float(), prepared.metric(name), layer.spec))
            for name, layer in prepared.layers.items()
        ]

    return variant


def by_rounded_inputs(solver: Solver) -> Variant:
    """All layers for the inputs that they have while all weights are rounded and none is pruned."""

    def variant(prepared: Prepared) -> Sequence[float]:
        for layer in prepared.layers.values():
            layer.quantize_weight = layer.spec.weight_bits is not None
        return list(solve_layers(prepared.student, prepared.blocks, prepared.batches, solver, deployed=True).values())

    return variant


def _start(layer: QuantLinear, solution: Solution) -> float:
    layer.start_from(solution.weight, solution.mask, solution.scale)
    return solution.error


@torch.no_grad()
def sequential(prepared: Prepared, *, corrected: bool, solver: Solver = ADMM) -> list[float]:
    """Layer after layer, for the inputs that those before leave it.

    `corrected`: a layer's target are the outputs of the dense model, and where it writes into the residual stream, also
    what the stream lacks by then.
    """
    known = _inputs(prepared.dense, prepared.layers, prepared.batches) if corrected else {}
    errors = []
    for block in prepared.blocks:
        names = list(block)
        for position, name in enumerate(names):
            layer = block[name]
            stream = {"attention_output": 0, "ffn_down": 4}.get(_ROLES[position]) if corrected else None
            wanted = {name: layer} if stream is None else {name: layer, names[stream]: block[names[stream]]}
            read = _inputs(prepared.student, wanted, prepared.batches)
            x = read[name]
            centred = x - x.mean(dim=0) if corrected else x  # a bias takes up what is the same for all tokens
            metric = OutputMetric(centred.T @ centred / len(x))
            target = layer.weight.detach().float()
            if corrected:
                lacking = None if stream is None else known[names[stream]] - read[names[stream]]
                target, shift = _corrected(target, metric, x, known[name], lacking)
            solution = solver(target, metric, layer.spec)
            layer.start_from(solution.weight, solution.mask, solution.scale)
            if corrected and layer.bias is not None:
                layer.bias.add_(shift - solution.weight @ x.mean(dim=0))
            errors.append(solution.error)
    return errors


_ROLES = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")


def _corrected(
    weight: Tensor, metric: OutputMetric, x: Tensor, dense: Tensor, lacking: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(the weight (out, in) that comes nearest to the dense outputs for inputs x (tokens, in), the mean output (out,)
    that is wanted), by least squares in centred moments."""
    centred, wanted = x - x.mean(dim=0), dense - dense.mean(dim=0)
    cross = weight @ (wanted.T @ centred) / len(x)
    mean = weight @ dense.mean(dim=0)
    if lacking is not None:
        cross = cross + (lacking - lacking.mean(dim=0)).T @ centred / len(x)
        mean = mean + lacking.mean(dim=0)
    damping = metric.damping * metric.raw.diagonal().mean()
    covariance = centred.T @ centred / len(x) + damping * torch.eye(x.shape[1])
    return torch.linalg.solve(covariance, (cross + damping * weight).T).T, mean


@torch.no_grad()
def _inputs(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, Tensor]:
    """What layers of a model read, (tokens, in), by weight name."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    real: list[Tensor] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: kept[name].append(args[0][real[-1]].float())

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(keep(name)) for name in layers
    ]
    for batch in batches:
        real.append(batch["attention_mask"].bool())
        model(**{key: value for key, value in batch.items() if key != "labels"})
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


@torch.no_grad()
def joint(weight: Tensor, metric: OutputMetric, spec: WeightSpec) -> Solution:
    """ADMM whose constraint is pattern and grid together, then descent from where it ends; of every row the better of
    this and of `solve`."""
    usual = ADMM(weight, metric, spec)
    if spec.pattern is None or spec.qmax is None or usual.scale is None:
        return usual
    codes, scale = _joint_codes(weight.float(), metric, spec.pattern, spec.qmax)
    mask = nm_mask(
        codes.abs() + 1e-3 * (weight * metric.norms).abs() / (weight * metric.norms).abs().max(), spec.pattern
    )
    keep = mask.float()
    for _ in range(2 * layerwise.WHOLE.sweeps):
        codes = layerwise._descend(weight, codes, scale, metric, keep, spec.qmax)
        scale = layerwise._fitted_scale(codes, weight, metric, scale)
    better = (metric.error(weight - codes * scale) < metric.error(weight - usual.weight))[:, None]
    assert usual.mask is not None
    mask = torch.where(better, mask, usual.mask)
    return replace(
        usual,
        latent=refit(weight, metric, mask),
        weight=torch.where(better, codes * scale, usual.weight),
        mask=mask,
        scale=torch.where(better, scale, usual.scale),
        error=float(metric.error(weight - torch.where(better, codes * scale, usual.weight)).sum())
        / max(float(metric.error(weight).sum()), 1e-30),
    )


def _joint_codes(weight: Tensor, metric: OutputMetric, pattern: NMPattern, qmax: int) -> tuple[Tensor, Tensor]:
    """(codes (out, in), scale (out, 1)) of 60 iterations; the penalty grows more slowly: the grid has many corners."""
    values, vectors = metric.eigen
    dense = weight * metric.norms
    target = dense @ vectors * values
    importance = metric.h.diagonal()
    z = dense * nm_mask(dense.abs(), pattern)
    dual, penalty = torch.zeros_like(dense), 0.1
    for iteration in range(60):
        x = ((target + (penalty * z - dual) @ vectors) / (values + penalty)) @ vectors.T
        candidate = x + dual / penalty
        pruned = candidate * nm_mask(candidate.abs(), pattern) / metric.norms
        if iteration % 10 == 0:
            scale = weighted_scale(pruned, importance, qmax)
        codes = torch.round(pruned / scale).clamp_(-qmax, qmax)
        z = codes * scale * metric.norms
        dual += penalty * (x - z)
        penalty *= 1.07
    return codes, scale


@torch.no_grad()
def scales_searched(
    weight: Tensor, metric: OutputMetric, spec: WeightSpec, *, solver: Solver, factors: Sequence[float]
) -> Solution:
    """Codes and descent for several scales around the usual one; of every row the best by its output error."""
    best = solver(weight, metric, spec)
    if spec.qmax is None or best.scale is None:
        return best
    keep = None if best.mask is None else best.mask.float()
    usual = weighted_scale(best.latent, metric.h.diagonal(), spec.qmax)
    for factor in factors:
        scale = factor * usual
        codes = layerwise._compensated_codes(best.latent, metric.inverse_factor, scale, keep, spec.qmax)
        for _ in range(layerwise.WHOLE.sweeps):
            scale = layerwise._fitted_scale(codes, weight, metric, scale)
            codes = layerwise._descend(weight, codes, scale, metric, keep, spec.qmax)
        better = (metric.error(weight - codes * scale) < metric.error(weight - best.weight))[:, None]
        best = replace(
            best,
            weight=torch.where(better, codes * scale, best.weight),
            scale=torch.where(better, scale, best.scale),
        )
    whole = max(float(metric.error(weight).sum()), 1e-30)
    return replace(best, error=float(metric.error(weight - best.weight).sum()) / whole)


@torch.no_grad()
def iterated_mask(
    weight: Tensor,
    metric: OutputMetric,
    pattern: NMPattern,
    *,
    penalty: float = 0.1,
    growth: float = 1.1,
    iterations: int = 100,
    start: Tensor | None = None,
) -> Tensor:
    """`compressors.pruning.layerwise.admm_mask` with another schedule, or from another `start` (out, in); it stops at
    the first mask that does not change, and not before."""
    values, vectors = metric.eigen
    dense = weight * metric.norms
    target = dense @ vectors * values
    z = dense if start is None else start * metric.norms
    mask = nm_mask(z.abs(), pattern)
    z, dual = z * mask, torch.zeros_like(dense)
    for iteration in range(iterations):
        x = ((target + (penalty * z - dual) @ vectors) / (values + penalty)) @ vectors.T
        candidate = x + dual / penalty
        previous, mask = mask, nm_mask(candidate.abs(), pattern)
        z = candidate * mask
        dual += penalty * (x - z)
        penalty *= growth
        if iteration and torch.equal(mask, previous):
            break
    return mask


def _scheduled(penalty: float, growth: float, iterations: int) -> Solver:
    """ADMM with another schedule of penalties."""

    def start(weight: Tensor, metric: OutputMetric, pattern: NMPattern) -> layerwise.Start:
        mask = iterated_mask(weight, metric, pattern, penalty=penalty, growth=growth, iterations=iterations)
        return mask, refit(weight, metric, mask)

    return Solver(start, round_to_least_error)


_WEAKER = {"2:4": ("4:8",), "1:4": ("4:8", "2:4")}  # what a pattern is reached through


def _in_rounds(weight: Tensor, metric: OutputMetric, pattern: NMPattern, *, nested: bool) -> layerwise.Start:
    """ADMM for one pattern after another, each from the refit of the one before; `nested`: that refit is also what the
    next mask is to come near to, instead of the dense weight. The last refit is of the dense weight."""
    latent = weight
    for weaker in (*_WEAKER.get(str(pattern), ()), str(pattern)):
        mask = iterated_mask(latent if nested else weight, metric, NMPattern.parse(weaker), start=latent)
        latent = refit(weight, metric, mask)
    return mask, latent


def damped(weight: Tensor, metric: OutputMetric, spec: WeightSpec, *, damping: float) -> Solution:
    """ADMM with more or less added to the diagonal of the moments."""
    return ADMM(weight, OutputMetric(metric.raw, damping), spec)


def biases_corrected(prepared: Prepared, *, solver: Solver) -> Sequence[float]:
    """What is the same for all tokens is left to the biases, so that the metric is of centred inputs."""
    known, errors = prepared.inputs.centred, []
    for block in prepared.blocks:
        if not known.keys() >= block.keys():
            for layer in prepared.layers.values():
                layer.quantize_weight = False
            for name, x in _inputs(prepared.student, block, prepared.batches).items():
                mean = x.mean(dim=0)
                known[name] = OutputMetric((x - mean).T @ (x - mean) / len(x)), mean
    with torch.no_grad():
        for name, layer in prepared.layers.items():
            metric, mean = known[name]
            dense = layer.weight.float().clone()
            solution = solver(dense, metric, layer.spec)
            errors.append(_start(layer, solution))
            if layer.bias is not None:
                layer.bias.add_((dense - solution.weight) @ mean)
    return errors


def by_gradients(prepared: Prepared, *, share: float) -> Sequence[float]:
    """ADMM where tokens count by the squared gradient of the loss at a layer's outputs, for a label that is drawn from
    the dense model's own answer; by `share`, the rest as usual."""
    known, errors = prepared.inputs.weighted, []
    if not known:
        known.update(_weighted_moments(prepared))
    with torch.no_grad():
        for name, layer in prepared.layers.items():
            plain, weighted = prepared.metric(name).raw, known[name]
            scaled = weighted * (plain.diagonal().mean() / weighted.diagonal().mean())
            metric = OutputMetric(torch.lerp(plain, scaled, share))
            errors.append(_start(layer, ADMM(layer.weight.float(), metric, layer.spec)))
    return errors


def _weighted_moments(prepared: Prepared) -> dict[str, Tensor]:
    """``E[|g|^2 x x^T]`` (in, in) of the layers of the dense model, by weight name."""
    model, draws = prepared.dense, torch.Generator().manual_seed(0)
    read: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    real = torch.empty(0)

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            read[name] = args[0].detach()[real]

        return hook

    def count(name: str) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, __: object, gradients: tuple[Tensor, ...]) -> None:
            x = read[name] * gradients[0].detach()[real].norm(dim=-1, keepdim=True)
            sums[name] = x.T @ x + sums.get(name, 0.0)

        return hook

    handles = []
    for name in prepared.layers:
        layer = model.get_submodule(name.removesuffix(".weight"))
        handles += [layer.register_forward_pre_hook(keep(name)), layer.register_full_backward_hook(count(name))]
    for batch in prepared.batches:
        real = batch["attention_mask"].bool()
        output: TaskOutput = model(**{key: value for key, value in batch.items() if key != "labels"})
        drawn = torch.multinomial(output.logits.detach().softmax(-1), 1, generator=draws)[:, 0]
        torch.autograd.backward(nn.functional.cross_entropy(output.logits, drawn, reduction="sum"))
        model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    return sums


_NEAR, _WIDE = (0.8, 0.9, 1.1), (0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.4)

VARIANTS: Mapping[str, Variant] = {
    "magnitude": by_solver(MAGNITUDE),
    "obs": by_solver(SECOND_ORDER),
    "obs-refit": by_solver(REFITTED),
    "admm": by_solver(ADMM),
    "obs, inputs of rounded weights": by_rounded_inputs(SECOND_ORDER),
    "obs-refit, inputs of rounded weights": by_rounded_inputs(REFITTED),
    "admm, inputs of rounded weights": by_rounded_inputs(ADMM),
    "admm, joint": by_solver(joint),
    "admm, scales searched": by_solver(partial(scales_searched, solver=ADMM, factors=_NEAR)),
    "admm, more scales searched": by_solver(partial(scales_searched, solver=ADMM, factors=_WIDE)),
    "obs-refit, scales searched": by_solver(partial(scales_searched, solver=REFITTED, factors=_NEAR)),
    "admm, slowly": by_solver(_scheduled(penalty=0.03, growth=1.03, iterations=300)),
    "admm, fast": by_solver(_scheduled(penalty=0.1, growth=1.3, iterations=100)),
    "admm, in rounds": by_solver(Solver(partial(_in_rounds, nested=False), round_to_least_error)),
    "admm, in nested rounds": by_solver(Solver(partial(_in_rounds, nested=True), round_to_least_error)),
    "admm, damping .001": by_solver(partial(damped, damping=0.001)),
    "admm, damping .1": by_solver(partial(damped, damping=0.1)),
    "admm, biases corrected": partial(biases_corrected, solver=ADMM),
    "obs-refit, biases corrected": partial(biases_corrected, solver=REFITTED),
    "admm, by gradients": partial(by_gradients, share=1.0),
    "admm, half by gradients": partial(by_gradients, share=0.5),
    "admm, sequential": partial(sequential, corrected=False),
    "admm, sequential, corrected": partial(sequential, corrected=True),
    "obs-refit, sequential, corrected": partial(sequential, corrected=True, solver=REFITTED),
}
