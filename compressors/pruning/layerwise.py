"""Layer-wise ADMM: N:M masks and integer codes of least output error, found before any training.

For a linear layer y = W x, W (out, in), the mean squared error of its outputs under other weights Z is
``E(Z) = tr((W - Z) H (W - Z)^T)`` with ``H = E[x x^T]`` (`compressors.pruning.layer_inputs`). Four steps make a small
E, all rows of a matrix at once:

1. **Mask** by ADMM: ``min E(X)  s.t.  X = Z, Z in N:M``. The X step is exact (one eigendecomposition of H serves every
   penalty), the Z step keeps the N largest of each group, the unscaled dual V adds up what they disagree on
   (`admm_mask`). This is the operator splitting of NxMiFormer (arXiv 2206.15014) in the metric of the layer's outputs
   instead of the loss of the task; for language models see ALPS (arXiv 2406.07831) and Boza (arXiv 2401.02938).
2. **Refit**: the exact minimum of E on the mask, by preconditioned conjugate gradients (`refit`).
3. **Grid**: one scale per row, codes by error compensation from left to right (GPTQ, arXiv 2210.17323).
4. **Descent**: single codes move to where E is least with all others fixed, scales are refitted; E never grows.

Inputs are normalised to unit mean square in step 1: it makes a fixed schedule of penalties fit every layer.

`SOLVERS` has this and its rivals under one signature. Training starts from what they find, and ``--steps 0`` saves it.
`DRAFTS` has the same with less `Effort`: the search's table (`compressors.search.sensitivity`) asks what each of many
options costs, of which one is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor, nn

from compressors import distributed
from compressors.projections import mse_scale, nm_mask
from compressors.pruning.layer_inputs import Batches, second_moments
from compressors.pruning.sparsegpt import inverse_factor, prune
from compressors.quantization.fake_quant import QuantLinear
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.errors import DataError

DAMPING = 0.01  # of the mean diagonal of H: keeps its inverse finite for inputs that hardly vary
_PENALTY = 0.1  # rho at first; .01 to .1 agree within 0.5 %
_SETTLED_AFTER, _SETTLED_SHARE = 20, 3e-4  # stop once so few kept entries change
_REFIT_TOLERANCE = 1e-5  # of conjugate gradients; residual relative to the first
_LOWEST_SCALE, _SCALE_REFINEMENTS = 0.3, 10
_BLOCK = 128  # columns whose updates to the rest are applied together, for speed only


@dataclass(frozen=True)
class Effort:
    """How far the steps of a solver go.

    `growth` is that of ADMM's penalty per iteration (1.1, and 1.1 to 1.3 every third, agree within 0.5 %), `sweeps` are
    of coordinate descent. From `nearest_from` on, the largest code, each weight is rounded for itself.
    """

    iterations: int = 100  # at most; they settle after 21 to 23
    growth: float = 1.1
    refit_steps: int = 60
    scale_points: int = 36
    sweeps: int = 3
    nearest_from: int | None = None


WHOLE = Effort()
# Two fifths of the time. E of MiniLM-L6 is 3 to 19 % above that of the whole effort with 4 bits. For 8 bits it
# is a few times as large, but rounding is a hundredth of what pruning costs, and the grid is not worth its time.
DRAFT = Effort(iterations=8, growth=1.3, refit_steps=16, scale_points=12, sweeps=1, nearest_from=127)


@dataclass(frozen=True)
class Solution:
    """What became of one weight matrix W (out, in).

    `latent` is the refit on `mask`, in float: where training starts from. `weight` is what is deployed without
    training: on the mask, and ``codes * scale`` where there are bits. `error` is E(weight) / E(0).
    """

    latent: Tensor
    weight: Tensor
    mask: Tensor | None  # (out, in) bool; None without a pattern
    scale: Tensor | None  # (out, 1); None without bits
    error: float

    def to(self, device: torch.device | str) -> Solution:
        """The same on another device."""
        mask, scale = (None if part is None else part.to(device) for part in (self.mask, self.scale))
        return Solution(self.latent.to(device), self.weight.to(device), mask, scale, self.error)


class OutputMetric:
    """``tr(D H D^T)`` of differences D (out, in) of weights, for one input tensor; layers that read it share this.

    `hessian` (in, in) is E[x x^T]; it is damped by `damping` times its mean diagonal. Raises `DataError` where it is
    not finite.
    """

    def __init__(self, hessian: Tensor, damping: float = DAMPING) -> None:
        if not bool(torch.isfinite(hessian).all()):
            raise DataError(
                "the inputs of a layer are not finite on the calibration samples; the model or the texts are broken"
            )
        raw = hessian.float()
        self.damping = damping
        self.raw = raw
        self.h = raw + torch.eye(len(raw), device=raw.device) * (damping * raw.diagonal().mean()).clamp(min=1e-12)

    @cached_property
    def norms(self) -> Tensor:
        """Root mean square of each input, damped; (in,)."""
        return self.h.diagonal().sqrt()

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """(values (in,), vectors (in, in)) of H with inputs of unit mean square."""
        values, vectors = torch.linalg.eigh(self.h / (self.norms[:, None] * self.norms))
        return values, vectors

    @cached_property
    def inverse_factor(self) -> Tensor:
        """Upper Cholesky factor (in, in) of the inverse of H."""
        return inverse_factor(self.raw, self.damping)

    def error(self, difference: Tensor) -> Tensor:
        """``d H d^T`` of every row; (out,)."""
        return ((difference @ self.h) * difference).sum(dim=1)


MaskOf = Callable[[Tensor, OutputMetric, NMPattern], Tensor]


@torch.no_grad()
def admm_mask(weight: Tensor, metric: OutputMetric, pattern: NMPattern, effort: Effort = WHOLE) -> Tensor:
    """The N:M mask (out, in) that ADMM finds for `weight`; see the module's text, step 1."""
    values, vectors = metric.eigen
    dense = weight.float() * metric.norms
    target = dense @ vectors * values  # W H in the eigenbasis
    mask = nm_mask(dense.abs(), pattern)
    z = dense * mask
    dual = torch.zeros_like(dense)
    penalty = _PENALTY
    kept = max(1, int(mask.sum()))
    for iteration in range(1, effort.iterations + 1):
        x = ((target + (penalty * z - dual) @ vectors) / (values + penalty)) @ vectors.T
        candidate = x + dual / penalty
        previous, mask = mask, nm_mask(candidate.abs(), pattern)
        z = candidate * mask
        dual += penalty * (x - z)
        penalty *= effort.growth
        changed = int((mask & ~previous).sum())
        if iteration > 1 and (changed == 0 or (iteration >= _SETTLED_AFTER and changed < _SETTLED_SHARE * kept)):
            break
    return mask


@torch.no_grad()
def second_order_mask(weight: Tensor, metric: OutputMetric, pattern: NMPattern) -> Tensor:
    """The mask of greedy second-order pruning (`compressors.pruning.sparsegpt`): the control for `admm_mask`."""
    pruned = prune(weight.float(), metric.raw, pattern, metric.damping)
    return nm_mask(pruned.abs(), pattern)


@torch.no_grad()
def refit(weight: Tensor, metric: OutputMetric, mask: Tensor, effort: Effort = WHOLE) -> Tensor:
    """argmin of ``E(R)`` over R with its non-zeros in `mask`; conjugate gradients, diagonal preconditioner, row by row.

    It starts at the masked weight, and every step lowers E.
    """
    keep = mask.float()
    diagonal = metric.h.diagonal()
    r = weight.float() * keep
    residual = ((weight.float() - r) @ metric.h) * keep  # minus half of the gradient
    z = residual / diagonal
    direction = z.clone()
    energy = (residual * z).sum(dim=1, keepdim=True)
    first = energy.clamp(min=1e-30)
    for _ in range(effort.refit_steps):
        product = (direction @ metric.h) * keep
        curvature = (direction * product).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature.clamp(min=1e-30), 0.0)
        r += step * direction
        residual -= step * product
        z = residual / diagonal
        renewed = (residual * z).sum(dim=1, keepdim=True)
        if bool((renewed <= _REFIT_TOLERANCE**2 * first).all()):
            break
        direction = z + torch.where(energy > 0, renewed / energy.clamp(min=1e-30), 0.0) * direction
        energy = renewed
    return r


@torch.no_grad()
def round_to_least_error(
    weight: Tensor, latent: Tensor, metric: OutputMetric, mask: Tensor | None, qmax: int, effort: Effort = WHOLE
) -> tuple[Tensor, Tensor]:
    """(codes (out, in) in [-qmax, qmax], scale (out, 1)) of small ``E(codes * scale)``; zero outside `mask`."""
    scale = weighted_scale(latent, metric.h.diagonal(), qmax, effort.scale_points)
    if effort.nearest_from is not None and qmax >= effort.nearest_from:
        codes = torch.round(latent / scale).clamp_(-qmax, qmax)  # 0 where the mask is
        return codes, _fitted_scale(codes, weight, metric, scale)
    keep = None if mask is None else mask.float()
    codes = _compensated_codes(latent, metric.inverse_factor, scale, keep, qmax)
    scale = _fitted_scale(codes, weight, metric, scale)
    for _ in range(effort.sweeps):
        codes = _descend(weight, codes, scale, metric, keep, qmax)
        scale = _fitted_scale(codes, weight, metric, scale)
    return codes, scale


def weighted_scale(weight: Tensor, importance: Tensor, qmax: int, points: int = WHOLE.scale_points) -> Tensor:
    """Scale (out, 1) of least rounding error ``sum_j importance_j (w_j - Q(w_j))^2`` among `points` from 0.3 to 1 of
    the max-abs scale, refined by least squares. Rows of zeros get 1."""
    largest = weight.abs().amax(dim=1, keepdim=True) / qmax
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))

    def cost(scale: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.round(weight / scale).clamp_(-qmax, qmax)
        return ((weight - codes * scale).square() * importance).sum(dim=1, keepdim=True), codes

    best, (least, codes) = largest, cost(largest)
    shares = torch.linspace(_LOWEST_SCALE, 1.0, points)[:-1].tolist() if qmax < 127 else []
    candidates: list[Tensor | None] = [largest * share for share in shares]
    for candidate in [*candidates, *[None] * _SCALE_REFINEMENTS]:
        if candidate is None:  # refine the best so far
            power = (codes.square() * importance).sum(dim=1, keepdim=True)
            fitted = (codes * weight * importance).sum(dim=1, keepdim=True) / power.clamp(min=1e-30)
            candidate = torch.where(fitted > 0, fitted, best)
        error, its_codes = cost(candidate)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
        codes = torch.where(better, its_codes, codes)
    return best


def _compensated_codes(latent: Tensor, factor: Tensor, scale: Tensor, keep: Tensor | None, qmax: int) -> Tensor:
    """Codes column by column, the error of each spread over the columns to come (GPTQ)."""
    w = latent.clone()
    codes = torch.empty_like(w)
    columns = w.shape[1]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            code = torch.round(w[:, j] / scale[:, 0]).clamp_(-qmax, qmax)
            if keep is not None:
                code *= keep[:, j]
            error = (w[:, j] - code * scale[:, 0]) / factor[j, j]
            w[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
            codes[:, j] = code
            errors[:, j - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _descend(
    weight: Tensor, codes: Tensor, scale: Tensor, metric: OutputMetric, keep: Tensor | None, qmax: int
) -> Tensor:
    """One sweep of exact coordinate descent on E over the codes, columns in order."""
    codes, diagonal = codes.clone(), metric.h.diagonal()
    pull = (weight - codes * scale) @ metric.h  # (W - Z) H
    columns = codes.shape[1]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        moves = torch.zeros_like(codes[:, start:stop])
        local = pull[:, start:stop].clone()
        for j in range(start, stop):
            value = codes[:, j] * scale[:, 0]
            code = torch.round((value + local[:, j - start] / diagonal[j]) / scale[:, 0]).clamp_(-qmax, qmax)
            if keep is not None:
                code *= keep[:, j]
            moved = code * scale[:, 0] - value
            local -= moved[:, None] * metric.h[j, start:stop]
            moves[:, j - start], codes[:, j] = moved, code
        pull -= moves @ metric.h[start:stop]
    return codes


def _fitted_scale(codes: Tensor, weight: Tensor, metric: OutputMetric, scale: Tensor) -> Tensor:
    """argmin of ``E(codes * s)`` over s (out, 1); the former scale where that is not positive."""
    product = codes @ metric.h
    power = (product * codes).sum(dim=1, keepdim=True)
    fitted = (product * weight).sum(dim=1, keepdim=True) / power.clamp(min=1e-30)
    return torch.where((power > 0) & (fitted > 0), fitted, scale)


Start = tuple[Tensor, Tensor]  # mask (out, in), latent weight (out, in)


@dataclass(frozen=True)
class Solver:
    """A way to make weights for a pattern and for a grid; call it with (weight (out, in), metric of its inputs, spec).

    `start` gives mask and latent weight under a pattern, `grid` codes and scale of (weight, latent, metric, mask,
    qmax).
    """

    start: Callable[[Tensor, OutputMetric, NMPattern], Start]
    grid: Callable[[Tensor, Tensor, OutputMetric, Tensor | None, int], tuple[Tensor, Tensor]]

    def __call__(self, weight: Tensor, metric: OutputMetric, spec: WeightSpec) -> Solution:
        """The weight under one spec."""
        return self.all(weight, metric, [spec])[0]

    @torch.no_grad()
    def all(self, weight: Tensor, metric: OutputMetric, specs: Sequence[WeightSpec]) -> list[Solution]:
        """The weight under each of several specs; those with one pattern share their start."""
        dense = weight.float()
        starts: dict[NMPattern, Start] = {}
        whole = float(metric.error(dense).sum())
        solutions = []
        for spec in specs:
            mask, latent, scale = None, dense, None
            if spec.pattern is not None:
                if spec.pattern not in starts:
                    starts[spec.pattern] = self.start(dense, metric, spec.pattern)
                mask, latent = starts[spec.pattern]
            deployed = latent
            if spec.qmax is not None:
                codes, scale = self.grid(dense, latent, metric, mask, spec.qmax)
                deployed = codes * scale
            error = float(metric.error(dense - deployed).sum()) / whole if whole > 0 else 0.0
            solutions.append(Solution(latent.to(weight.dtype), deployed.to(weight.dtype), mask, scale, error))
        return solutions


def _refitted(weight: Tensor, metric: OutputMetric, pattern: NMPattern, mask_of: MaskOf, effort: Effort) -> Start:
    mask = mask_of(weight, metric, pattern)
    return mask, refit(weight, metric, mask, effort)


def _refitting(mask_of: MaskOf, effort: Effort) -> Solver:
    start = partial(_refitted, mask_of=mask_of, effort=effort)
    return Solver(start, partial(round_to_least_error, effort=effort))


def _pruned(weight: Tensor, metric: OutputMetric, pattern: NMPattern) -> Start:
    pruned = prune(weight, metric.raw, pattern, metric.damping)
    mask = nm_mask(pruned.abs(), pattern)
    return mask, pruned * mask


def _largest(weight: Tensor, _: OutputMetric, pattern: NMPattern) -> Start:
    mask = nm_mask(weight.abs(), pattern)
    return mask, weight * mask


def _nearest(_: Tensor, latent: Tensor, __: OutputMetric, ___: Tensor | None, qmax: int) -> tuple[Tensor, Tensor]:
    """Each weight rounded for itself, by the scale of least squared error."""
    scale = mse_scale(latent, qmax)
    return torch.round(latent / scale).clamp_(-qmax, qmax), scale


ADMM = _refitting(admm_mask, WHOLE)
REFITTED = _refitting(second_order_mask, WHOLE)  # the control for `ADMM`
SECOND_ORDER = Solver(_pruned, _nearest)  # `compressors.pruning.sparsegpt` alone
MAGNITUDE = Solver(_largest, _nearest)  # asks nothing of the inputs
SOLVERS: Mapping[str, Solver] = {"admm": ADMM, "obs-refit": REFITTED, "obs": SECOND_ORDER}  # by recipe
DRAFTS: Mapping[str, Solver] = {
    "admm": _refitting(partial(admm_mask, effort=DRAFT), DRAFT),
    "obs-refit": _refitting(second_order_mask, DRAFT),
    "obs": SECOND_ORDER,
}


class Finished(Protocol):
    """Solutions of parts that were finished, by number (`compressors.pruning.solved_blocks`)."""

    def read(self, block: int, /) -> dict[str, Solution] | None:
        """The solutions of a part by weight name, or None where it was not finished."""

    def write(self, block: int, solutions: Mapping[str, Solution], /) -> None:
        """Keep the solutions of a finished part."""


@torch.no_grad()
def solve_layers(
    model: nn.Module,
    blocks: Sequence[Mapping[str, QuantLinear]],
    batches: Batches,
    solver: Callable[[Tensor, OutputMetric, WeightSpec], Solution] = ADMM,
    *,
    deployed: bool = False,
    finished: Finished | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Solve the prepared layers of a model and put the solutions into them; returns the error of each, by weight name.

    Layers start from their latent weights, or, where nothing will train them, from the `deployed` ones. `blocks` are
    layers by weight name, in parts; the second moments of one part are in memory at a time, and those of layers that
    read one tensor are decomposed once. Every layer is solved for the inputs that it has in the model as it comes.
    Under ``torchrun`` each process solves some parts, and all get the same solutions. What `finished` has of an
    interrupted run is taken from there, and what is solved is kept in it.
    """
    total = sum(len(block) for block in blocks)
    solved: dict[str, Solution] = {}
    for number, block in list(enumerate(blocks))[distributed.rank() :: distributed.world_size()]:
        part = finished.read(number) if finished is not None else None
        if part is None:
            part = {}
            for name, metric in metrics(second_moments(model, block, batches)):
                part[name] = solver(block[name].weight, metric, block[name].spec).to("cpu")
                progress(min((len(solved) + len(part)) * distributed.world_size(), total), total)
            if finished is not None:
                finished.write(number, part)
        solved |= part
    solutions = {name: solution for others in distributed.gathered([solved]) for name, solution in others.items()}
    for block in blocks:
        for name, layer in block.items():
            solution = solutions[name].to(layer.weight.device)
            layer.start_from(solution.weight if deployed else solution.latent, solution.mask, solution.scale)
    return {name: solutions[name].error for block in blocks for name in block}


def metrics(moments: dict[str, Tensor]) -> Iterator[tuple[str, OutputMetric]]:
    """(name, metric) of every layer; layers that share a tensor share a metric. One is there at a time; empties
    `moments`."""
    while moments:
        first = next(iter(moments.values()))
        metric = OutputMetric(first)
        for name in [name for name, moment in moments.items() if moment is first]:
            del moments[name]
            yield name, metric
