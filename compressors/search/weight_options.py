"""What every weight of a model can become, what that costs, and the budgets of a search, known without the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compressors.search.settings import SearchSettings
from nxm_export.contract.encoder_family import OPERAND, Family
from nxm_export.contract.plan import INT8_ATTENTION, REFERENCE_BITS, WeightSpec
from nxm_export.errors import PlanError

_IMPOSSIBLE = 2**60  # cost of an option that a weight does not allow: no budget reaches it


class WeightOptions:
    """What every weight of a model can become, what that costs, and the budgets in bits, all known without its weights.

    Raises `PlanError` for a placement that the family has no room for, for candidates that a weight does not allow, and
    for a budget that they do not reach.
    """

    def __init__(self, family: Family, config: Mapping[str, object], settings: SearchSettings) -> None:
        self.family, self.settings = family, settings
        family.require_placement(family.uniform_plan(config, WeightSpec.parse("W8"), placement=settings.placement))
        self.shapes = family.weights(config)
        self.names = list(self.shapes)
        self.candidate_specs = [WeightSpec.parse(text) for text in dict.fromkeys(settings.candidate_specs)]
        self.options = [[self._placed(name, option) for option in self.candidate_specs] for name in self.names]
        self._require_candidate_specs()
        self.costs = [
            [
                _IMPOSSIBLE if spec is None else spec.stored_bits(self.shapes[name], settings.counting)
                for spec in options
            ]
            for name, options in zip(self.names, self.options, strict=True)
        ]
        self.budget = self._budget(settings.compression, settings.bytes)
        self.further_budgets = [*map(self._budget, settings.pareto)]

    def _placed(self, name: str, option: WeightSpec) -> WeightSpec | None:
        """What a candidate spec means for a weight, with the quantizers of the placement; None where it is not
        allowed."""
        if option.pattern and self.shapes[name][1] % option.pattern.m:
            return None
        placed = self.family.placed(name, option, self.settings.placement)
        operand = self.family.operands_are_outputs and self.family.linear(name).writes == OPERAND
        if self.settings.placement in INT8_ATTENTION and operand and not placed.output_bits:
            return None  # INT8 attention needs all three of them quantized
        return placed

    def _require_candidate_specs(self) -> None:
        for name, options in zip(self.names, self.options, strict=True):
            if not any(options):
                out, in_ = self.shapes[name]
                raise PlanError(
                    f"{name} ({out}x{in_}) allows none of the candidate specs "
                    f"{', '.join(self.settings.candidate_specs)}; add dense, W8 or another "
                    "pattern"
                )
        for o, option in enumerate(self.candidate_specs):
            if not any(options[o] for options in self.options):
                raise PlanError(f"no weight of this model allows the candidate spec {option}; drop it")

    def _budget(self, compression: float | None, bytes_: int | None = None) -> int:
        """Bits within a compression or a number of bytes; raises `PlanError` with the nearest that the candidate specs
        reach."""
        total = sum(out * in_ for out, in_ in self.shapes.values()) * REFERENCE_BITS
        budget = bytes_ * 8 if bytes_ is not None else math.floor((1 - (compression or 0.0)) * total)
        least = sum(min(options) for options in self.costs)
        if least > budget:
            requested = f"compression {compression}" if bytes_ is None else f"{bytes_} bytes"
            nearest = math.floor((1 - least / total) * 1e4) / 1e4  # rounded down, so that asking for it works
            raise PlanError(
                f"{requested} by counting {self.settings.counting} is out of reach of the candidate specs "
                f"{', '.join(self.settings.candidate_specs)}; "
                f"the nearest feasible is compression {nearest:.4f} ({-(-least // 8)} bytes)"
            )
        return budget
