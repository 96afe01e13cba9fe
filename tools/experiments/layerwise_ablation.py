"""What layer-wise starts are worth before any training: the model compressed one-shot, in every way that was tried.

    python -m tools.experiments.layerwise_ablation DENSE --train train.tsv --dev dev.tsv --options 2:4+W4,1:4+W4

One line per option and variant (`VARIANTS`): mean KL(dense || compressed) in nats and agreement with the dense model
over dev, mean error of the layers relative to their outputs (for the inputs that the variant looks at), seconds. What
lost lives here, and nowhere else.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compressors.freed_memory import keep_freed_memory
from compressors.process_setup import prepare_process
from compressors.projections import nm_mask
from compressors.pruning import layerwise
from compressors.pruning.layer_inputs import Batches, by_block
from compressors.pruning.layerwise import (
    ADMM,
    MAGNITUDE,
    REFITTED,
    SECOND_ORDER,
    OutputMetric,
    Solution,
    Solver,
    refit,
    solve_layers,
    weighted_scale,
)
from compressors.quantization.fake_quant import QuantLinear, quant_linears
from compressors.settings import Settings
from compressors.training.phases import Job
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.progress import silent
from tools.experiments.one_shot import Dense, parser


@dataclass(frozen=True)
class Prepared:
    """A model with quantizers, the dense one, and the samples that both read."""

    student: nn.Module
    dense: nn.Module
    blocks: Sequence[Mapping[str, QuantLinear]]
    batches: Batches

    @property
    def layers(self) -> dict[str, QuantLinear]:
        return {name: layer for block in self.blocks for name, layer in block.items()}


Variant = Callable[[Prepared], Sequence[float]]  # compresses the student; returns the errors of its layers


def by_solver(solver: Callable[[Tensor, OutputMetric, WeightSpec], Solution], *, rounded: bool = False) -> Variant:
    """All layers for the inputs that they have while no weight is changed, or all are rounded and none is pruned."""

    def variant(prepared: Prepared) -> Sequence[float]:
        for layer in prepared.layers.values():
            layer.quantize_weight = rounded and layer.spec.weight_bits is not None
        return list(solve_layers(prepared.student, prepared.blocks, prepared.batches, solver, deployed=True).values())

    return variant


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
    for _ in range(2 * layerwise._SWEEPS):
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
def scales_searched(weight: Tensor, metric: OutputMetric, spec: WeightSpec) -> Solution:
    """Codes and descent for several scales around the usual one; of every row the best by its output error."""
    best = ADMM(weight, metric, spec)
    if spec.qmax is None or best.scale is None:
        return best
    keep = None if best.mask is None else best.mask.float()
    usual = weighted_scale(best.latent, metric.h.diagonal(), spec.qmax)
    for factor in (0.8, 0.9, 1.1):
        scale = factor * usual
        codes = layerwise._compensated_codes(best.latent, metric.inverse_factor, scale, keep, spec.qmax)
        for _ in range(layerwise._SWEEPS):
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


VARIANTS: Mapping[str, Variant] = {
    "magnitude": by_solver(MAGNITUDE),
    "obs": by_solver(SECOND_ORDER),
    "obs-refit": by_solver(REFITTED),
    "admm": by_solver(ADMM),
    "obs, inputs of rounded weights": by_solver(SECOND_ORDER, rounded=True),
    "obs-refit, inputs of rounded weights": by_solver(REFITTED, rounded=True),
    "admm, inputs of rounded weights": by_solver(ADMM, rounded=True),
    "admm, joint": by_solver(joint),
    "admm, scales searched": by_solver(scales_searched),
    "admm, sequential": partial(sequential, corrected=False),
    "admm, sequential, corrected": partial(sequential, corrected=True),
    "obs-refit, sequential, corrected": partial(sequential, corrected=True, solver=REFITTED),
}


def main() -> None:
    arguments = _parser().parse_args()
    prepare_process(arguments.threads)
    keep_freed_memory()
    dense = Dense.of(arguments)
    in_float: list[str] | None = None
    for option in arguments.options.split(","):
        for name in arguments.variants.split(";"):
            job = _job(dense, WeightSpec.parse(option), arguments)
            student = job.prepared().eval()
            in_float = _leave_in_float(job, student, in_float)
            blocks = by_block(quant_linears(student), dense.source.family.blocks(dense.source.config))
            prepared = Prepared(student, dense.model(), blocks, job.calibration_batches())
            began = time.monotonic()
            errors = VARIANTS[name](prepared)
            seconds = time.monotonic() - began
            job._calibrate(student)
            logits = dense.predict(student)
            print(
                f"{option}, {name}: KL {dense.kl(logits):.4f}, agreement {100 * dense.agreement(logits):.1f}, "
                f"layer error {float(np.mean(errors)):.4f}, {seconds:.0f} s",
                flush=True,
            )


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, max_length=128)
    made.add_argument("--options", default="2:4+W4,1:4+W4")
    made.add_argument("--variants", default=";".join(VARIANTS), help="Separated by semicolons.")
    made.add_argument("--samples", type=int, default=512)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int)
    return made


def _job(dense: Dense, spec: WeightSpec, arguments: argparse.Namespace) -> Job:
    settings = Settings(
        recipe="admm",
        steps=0,
        seed=arguments.seed,
        calibration_samples=arguments.samples,
        max_length=arguments.max_length,
    )
    plan = dense.source.family.uniform_plan(dense.source.config, spec)
    return Job(dense.source, dense.data, plan, settings, Path(tempfile.gettempdir()), silent)


def _leave_in_float(job: Job, student: nn.Module, known: list[str] | None) -> list[str]:
    """Drop the output quantizers that cost too much; they are measured once."""
    if known is None:
        return list(job._leave_in_float(student))
    layers = quant_linears(student)
    for name in known:
        layers[name].output_quantizer = None
        layers[name].spec = replace(layers[name].spec, output_bits=None)
    return known


if __name__ == "__main__":
    main()
