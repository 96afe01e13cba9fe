"""Weights under every option that a search may give them, compressed without training, for what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compressors import distributed
from compressors.pruning.layer_inputs import by_block, second_moments
from compressors.pruning.layerwise import OutputMetric, Solution, Solver, metrics
from compressors.quantization.even_channels import evened
from compressors.search.probe import Batches, InputScale, SensitivityProbe, Statistics
from nxm_export.contract.plan import WeightSpec

MOMENTS_IN_MEMORY = 2**28  # bytes, at most: layers that read one tensor share its moments
Options = Mapping[str, Sequence[WeightSpec]]  # what to make, by weight


@dataclass(frozen=True)
class Candidate:
    """A weight under an option, in as few bytes as it needs: `values` (out, in) are codes of `scale` (out, 1), or the
    weight itself where that is None. `errors` (out,) is the mean squared error of every output. Where its inputs are
    evened out, it is made for what comes out of the division by `factors` (in,)."""

    values: Tensor
    scale: Tensor | None
    errors: Tensor
    factors: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """(out, in) float32, for inputs that are not divided."""
        weight = self.values.float() if self.scale is None else self.values.float() * self.scale
        return weight if self.factors is None else weight / self.factors


class OneShot:
    """Every (weight, option) compressed without training, by `solver`, for what the layers of the dense model read on
    `batches`.

    All `options` of a block are made when the first of them is asked for. One pass over the samples gives its second
    moments, and those of blocks behind it that fit into memory, too; they are not kept. Where `statistics` say how the
    inputs of a weight are evened out, its 8-bit options are made for that; for plain inputs, too, where another weight
    reads the same tensor, as it is evened out for both or for none.
    """

    def __init__(
        self,
        probe: SensitivityProbe,
        statistics: Mapping[str, Statistics],
        batches: Batches,
        options: Options,
        solver: Solver,
    ) -> None:
        self.probe, self.statistics, self.batches, self.solver = probe, statistics, batches, solver
        self.options = {
            weight: {replace(option, output_bits=None) for option in specs} for weight, specs in options.items()
        }
        self._made: dict[tuple[str, WeightSpec, bool], Candidate] = {}  # the last: whether inputs are evened out
        self._moments: dict[str, Tensor] = {}  # of blocks that the last pass read, too

    def __call__(self, weight: str, option: WeightSpec, *, even: bool = True) -> tuple[Tensor, InputScale]:
        """(weight (out, in) float32, scale of its inputs); without `even`, other weights forbid to even them out."""
        made, known = self.candidate(weight, option, even=even), self.statistics[weight]
        if made.factors is not None:
            assert known.evened is not None
            return made.weight, known.evened.steps
        return made.weight, known.input_scale if option.input_bits else None

    def candidate(self, weight: str, option: WeightSpec, *, even: bool = True) -> Candidate:
        """What became of a weight; `option` is one of its `options`, whatever its output."""
        bare = replace(option, output_bits=None)
        key = weight, bare, even and self._evens(weight, bare)
        if key not in self._made:
            self._make(self.probe.family.block_of(weight))
        return self._made[key]

    def _evens(self, weight: str, option: WeightSpec) -> bool:
        return self.statistics[weight].evened is not None and evened(option)

    def share(self) -> None:
        """Give every process what any of them has made; all call this together."""
        for part in distributed.gathered([self._made]):
            self._made = part | self._made

    @torch.no_grad()
    def _make(self, block: str) -> None:
        """Every option of every weight of a block."""
        layers = {weight: self.probe.layer(weight) for weight in self.probe.weights if self.options.get(weight)}
        (inside,) = by_block(layers, [block])
        if not inside.keys() <= self._moments.keys():
            together = by_block(layers, self.probe.blocks[self.probe.blocks.index(block) :])
            self._moments = second_moments(self.probe.model, _fitting(together), self.batches)
        for weight, metric in metrics({weight: self._moments.pop(weight) for weight in inside}):
            dense, options = inside[weight].weight.detach().float(), sorted(self.options[weight], key=str)
            evens = [option for option in options if self._evens(weight, option)]
            plain = options if self._shares_its_input(weight) else [one for one in options if one not in evens]
            for option, solution in zip(plain, self.solver.all(dense, metric, plain), strict=True):
                self._made[weight, option, False] = _candidate(dense, metric, solution)
            known = self.statistics[weight].evened
            if known is None or not evens:
                continue
            factors = known.factors
            divided = OutputMetric(metric.raw / (factors[:, None] * factors), metric.damping)
            grown = dense * factors
            for option, solution in zip(evens, self.solver.all(grown, divided, evens), strict=True):
                self._made[weight, option, True] = replace(_candidate(grown, divided, solution), factors=factors)

    def _shares_its_input(self, weight: str) -> bool:
        family = self.probe.family
        return len(family.readers(family.block_of(weight), family.linear(weight).reads)) > 1


def _fitting(parts: Sequence[Mapping[str, nn.Linear]]) -> dict[str, nn.Linear]:
    """The layers of the first part, and of those behind it as long as all moments fit into memory."""
    taken, size = dict[str, nn.Linear](), 0
    for part in parts:
        size += sum(4 * layer.in_features**2 for layer in part.values())
        if taken and size > MOMENTS_IN_MEMORY:
            break
        taken |= part
    return taken


def _candidate(dense: Tensor, metric: OutputMetric, solution: Solution) -> Candidate:
    values, scale = solution.weight.half(), None
    if solution.scale is not None:
        values, scale = torch.round(solution.weight / solution.scale).to(torch.int8), solution.scale
    difference = dense - (values.float() if scale is None else values.float() * scale)
    return Candidate(values, scale, ((difference @ metric.raw) * difference).double().sum(dim=1))
