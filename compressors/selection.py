"""Which option each weight gets: candidates from the table, a joint check, swaps; or the authors' enumeration.

    statistics -> sensitivity table -> exact knapsack, for several mixes of the two sensitivities
               -> joint check (what the table cannot see: interactions) -> budget-neutral swaps

A `Selector` decides on slices of the training data; `compressors.search` cuts them and trains the finalists. With
``method="paper"`` it is the authors' search: options tied across layers, every combination within the budget scored
one-shot by the task metric.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compressors import knapsack
from compressors.project import PROJECTIONS
from compressors.sensitivity import Batches, Entry, OneShot, Probe, divergence, measure
from nxm_export.errors import DataError, PlanError
from nxm_export.metrics import metric_named
from nxm_export.plan import COUNTINGS, REFERENCE_BITS, CompressionPlan, WeightSpec

DEFAULT_MENU = ("2:4+W4", "W4", "2:4+W8", "W8", "dense")
METHODS = ("nxm", "paper")
MIXES = 11  # weights of the two sensitivities that candidates are made for
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SearchSettings:
    """What to search for, and how long.

    The budget is `compression` (1 - compressed/FP32 over the planned weights) by `counting`, or `bytes` by the same
    counting. `latency_ms`, with `latencies`, adds a second constraint: milliseconds per (role, option).
    """

    menu: tuple[str, ...] = DEFAULT_MENU
    counting: str = "hw"
    compression: float | None = 0.875
    bytes: int | None = None
    method: str = "nxm"
    samples: int = 256
    held_out: int = 256
    swaps: int = 40
    finalists: int = 4
    batch_size: int = 32
    percentile: float = 99.99
    placement: str = "inputs-outputs"
    attention: str = "float"
    seed: int = 0
    latency_ms: float | None = None
    latencies: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PlanError(f"unknown search method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.counting not in COUNTINGS:
            raise PlanError(f"unknown counting {self.counting!r}; choose one of {', '.join(COUNTINGS)}")
        if (self.compression is None) == (self.bytes is None):
            raise PlanError("give either a compression or a number of bytes")
        if self.compression is not None and not 0 < self.compression < 1:
            raise PlanError(f"compression is a share between 0 and 1, as in 0.875; got {self.compression}")
        if self.samples < 8 or self.held_out < 8:
            raise DataError("the search needs at least 8 calibration and 8 held-out samples")
        if self.latency_ms is not None and not self.latencies:
            raise PlanError("a latency limit needs a latency table (--latency-table)")


Choice = tuple[int, ...]  # index into the menu, per weight in model order


@dataclass(frozen=True)
class Trial:
    """One plan that was looked at: where it came from, what the table predicts, what it really does one-shot."""

    origin: str
    plan: CompressionPlan
    predicted: float
    joint: float

    def row(self) -> dict[str, Any]:
        """As in ``trials.csv``."""
        counted = {counting: round(self.plan.compression(counting), 6) for counting in COUNTINGS}
        options = json.dumps(self.plan.pattern_counts)
        return {"origin": self.origin, "predicted": self.predicted, "joint": self.joint, **counted, "options": options}


@dataclass(frozen=True)
class Selection:
    """Finalists (best first), every trial, and the seconds of each step."""

    finalists: list[Trial]
    trials: list[Trial]
    seconds: dict[str, float]

    @property
    def plan(self) -> CompressionPlan:
        """The plan that does best one-shot."""
        return self.finalists[0].plan


class Selector:
    """Chooses over one dense model: statistics, then `measure_table`, `candidates`, `swaps`; or `paper`."""

    def __init__(
        self,
        probe: Probe,
        config: Mapping[str, Any],
        settings: SearchSettings,
        calibration: Batches,
        held_out: Batches,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.probe, self.family, self.settings, self.progress = probe, probe.family, settings, progress
        self.calibration, self.held_out = calibration, held_out
        self.shapes = self.family.weights(config)
        self.names = list(self.shapes)
        self.menu = [WeightSpec.parse(text) for text in settings.menu]
        self.costs = [
            [_bits(option, shape, settings.counting) for option in self.menu] for shape in self.shapes.values()
        ]
        self.budget = self._budget()
        self.seconds: dict[str, float] = {}
        with self._timed("statistics"):
            self.one_shot = OneShot(probe, probe.statistics(calibration, settings.percentile))
            self.wanted = [probe.outputs(batch) for batch in held_out]
        self.losses: dict[str, list[list[float]]] = {}

    def run(self, table: Path) -> Selection:
        """Table (kept in the CSV file `table`), knapsack, joint check, swaps."""
        with self._timed("table"):
            self.measure_table(table)
        with self._timed("knapsack"):
            candidates = self.candidates(self.budget)
        with self._timed("joint check"):
            trials = []
            for number, (origin, choice) in enumerate(candidates.items()):
                trials.append(self.trial(origin, choice))
                self.progress("joint check", number + 1, len(candidates))
            trials += self.swaps(min(trials, key=lambda trial: trial.joint))
        return self._result(trials)

    def measure_table(self, file: Path) -> None:
        """Fill the sensitivity table and read the losses off it, each measure scaled to mean 1."""
        done = measure(
            self.probe,
            self.calibration,
            self.one_shot,
            [option for option in self.menu if not option.is_dense],
            file,
            progress=lambda part, total: self.progress("sensitivity", part, total),
        )
        rows = {(entry.weight, entry.option): entry for entry in done}
        for kind in ("kl", "fisher"):
            values = [max(0.0, getattr(entry, kind)) for entry in done]
            mean = float(np.mean(values)) or 1.0
            self.losses[kind] = [
                [0.0 if option.is_dense else _loss(rows.get((name, str(option))), kind, mean) for option in self.menu]
                for name in self.names
            ]

    def candidates(self, budget: int) -> dict[str, Choice]:
        """Distinct choices within a budget of bits: the knapsack at several mixes, free, tied by role and tied by layer."""
        found: dict[str, Choice] = {}
        for tie, groups in self._ties().items():
            for mix in np.linspace(0.0, 1.0, MIXES if tie == "free" else 3):
                choice = self._solve(float(mix), groups, budget)
                if choice is not None and choice not in found.values():
                    found[f"{tie}, {mix:.1f} fisher"] = choice
        if not found:
            raise PlanError(
                f"no choice of options fits {budget // 8} bytes and {self.settings.latency_ms} ms together; "
                "raise the latency limit or lower the compression"
            )
        return found

    def pareto(self, compressions: Sequence[float]) -> list[Trial]:
        """The best choice, jointly checked, at each of several compressions, all from the one table."""
        front = []
        for compression in compressions:
            choices = self.candidates(self._bits_of(compression))
            trials = [self.trial(f"{compression:.4f}: {origin}", choice) for origin, choice in choices.items()]
            front.append(min(trials, key=lambda trial: trial.joint))
        return front

    def swaps(self, best: Trial) -> list[Trial]:
        """Hill climbing: two weights change options within the budget, kept if that is jointly better."""
        rng = random.Random(self.settings.seed)
        choice = self._choice_of(best.plan)
        seen, trials = {choice}, []
        for number in range(self.settings.swaps):
            self.progress("swaps", number + 1, self.settings.swaps)
            moves = [move for move in (self._random_move(choice, rng) for _ in range(200)) if move and move not in seen]
            if not moves:
                break
            move = min(moves, key=self._predicted)
            seen.add(move)
            trial = self.trial(f"swap {number + 1}", move)
            trials.append(trial)
            if trial.joint < best.joint:
                best, choice = trial, move
        return trials

    def paper(self, metric: str, labels: Sequence[np.ndarray], top: int = 5) -> Selection:
        """The authors' search: options tied by role, every combination in the budget scored one-shot by `metric`.

        As theirs, weights are projected by magnitude; unlike theirs, the score is on a slice of train, and ties of the
        metric go to the smaller divergence.
        """
        roles = self._ties()["by role"]
        projected = [[self._by_magnitude(name, option) for option in self.menu] for name in self.names]
        feasible = [
            choice
            for options in itertools.product(range(len(self.menu)), repeat=len(roles))
            if self._cost(choice := self._spread(options, roles)) <= self.budget
        ]
        if not feasible:
            raise PlanError(self._infeasible())
        scored = []
        with self._timed("enumeration"):
            for number, choice in enumerate(feasible):
                installed = {
                    name: projected[i][option]
                    for i, (name, option) in enumerate(zip(self.names, choice, strict=True))
                    if not self.menu[option].is_dense
                }
                score, loss = self._score(installed, metric, labels)
                scored.append((-score, loss, choice))
                self.progress("enumeration", number + 1, len(feasible))
        best = sorted(scored)[:top]
        trials = [
            Trial(f"paper, {metric} {-score:.4f}", self.plan_of(choice), -score, loss) for score, loss, choice in best
        ]
        return Selection(trials, trials, self.seconds)

    def trial(self, origin: str, choice: Choice) -> Trial:
        """Evaluate a choice jointly on the held-out slice: mean divergence from the dense model, one-shot."""
        weights = {
            name: self.one_shot(name, self.menu[option])
            for name, option in zip(self.names, choice, strict=True)
            if not self.menu[option].is_dense
        }
        with self.probe.installed(weights):
            total = sum(
                divergence(wanted, self.probe.outputs(batch))
                for wanted, batch in zip(self.wanted, self.held_out, strict=True)
            )
        samples = sum(len(batch["input_ids"]) for batch in self.held_out)
        return Trial(origin, self.plan_of(choice), self._predicted(choice), total / samples)

    def plan_of(self, choice: Choice) -> CompressionPlan:
        """The plan of a choice, with the output quantizers of the placement."""
        specs = {
            name: self.family.placed(name, self.menu[option], self.settings.placement)
            for name, option in zip(self.names, choice, strict=True)
        }
        return CompressionPlan(self.family.model_type, specs, self.shapes, self.settings.attention)

    def _choice_of(self, plan: CompressionPlan) -> Choice:
        names = [str(option) for option in self.menu]
        return tuple(names.index(str(plan.weights[name])) for name in self.names)

    def _result(self, trials: list[Trial]) -> Selection:
        ranked = sorted(trials, key=lambda trial: trial.joint)
        finalists: list[Trial] = []
        for trial in ranked:
            if all(trial.plan != other.plan for other in finalists):
                finalists.append(trial)
        return Selection(finalists[: self.settings.finalists], trials, self.seconds)

    def _ties(self) -> dict[str, list[list[int]]]:
        """Groups of weights (by index) that must take the same option."""
        by_role: dict[str, list[int]] = {}
        by_layer: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            role = self.family.role(name)
            by_role.setdefault(role, []).append(i)
            by_layer.setdefault(name.removesuffix(f"{self.family.linears[role]}.weight"), []).append(i)
        return {
            "free": [[i] for i in range(len(self.names))],
            "by role": list(by_role.values()),
            "by layer": list(by_layer.values()),
        }

    def _solve(self, mix: float, groups: list[list[int]], budget: int) -> Choice | None:
        """Knapsack over groups; with a latency limit, the smallest weight on latency that keeps to it. None if nothing fits."""
        losses = np.array(self.losses["kl"]) * (1 - mix) + np.array(self.losses["fisher"]) * mix
        latency = self._latencies()

        def solve(price: float) -> Choice:
            priced = losses + price * latency
            chosen = knapsack.choose(
                [[float(sum(priced[i][o] for i in group)) for o in range(len(self.menu))] for group in groups],
                [[sum(self.costs[i][o] for i in group) for o in range(len(self.menu))] for group in groups],
                budget,
            )
            return self._spread(chosen, groups)

        def fits(choice: Choice) -> bool:
            limit = self.settings.latency_ms
            return limit is None or sum(latency[i][o] for i, o in enumerate(choice)) <= limit

        choice = solve(0.0)
        if fits(choice):
            return choice
        low, high = 0.0, 1e3 * float(losses[np.isfinite(losses)].max()) / max(float(latency.max()), 1e-12)
        best = solve(high)
        if not fits(best):
            return None
        for _ in range(40):
            middle = (low + high) / 2
            choice = solve(middle)
            low, high, best = (low, middle, choice) if fits(choice) else (middle, high, best)
        return best

    def _latencies(self) -> np.ndarray:
        """Milliseconds (weights, options) from the table by role and option; zero without a limit."""
        if self.settings.latency_ms is None:
            return np.zeros((len(self.names), len(self.menu)))
        found = np.empty((len(self.names), len(self.menu)))
        for i, name in enumerate(self.names):
            for o, option in enumerate(self.menu):
                role = self.family.role(name)
                try:
                    found[i, o] = self.settings.latencies[role][str(option)]
                except KeyError as error:
                    raise PlanError(
                        f"the latency table has no entry for {role} under {option}; measure it, or drop the option from the menu"
                    ) from error
        return found

    def _random_move(self, choice: Choice, rng: random.Random) -> Choice | None:
        first, second = rng.sample(range(len(choice)), 2)
        moved = list(choice)
        moved[first], moved[second] = rng.randrange(len(self.menu)), rng.randrange(len(self.menu))
        move = tuple(moved)
        allowed = all(np.isfinite(self.losses["kl"][i][move[i]]) for i in (first, second))
        return move if move != choice and allowed and self._cost(move) <= self.budget else None

    def _predicted(self, choice: Choice) -> float:
        return float(sum(self.losses["kl"][i][o] + self.losses["fisher"][i][o] for i, o in enumerate(choice))) / 2

    def _cost(self, choice: Choice) -> int:
        return sum(self.costs[i][o] for i, o in enumerate(choice))

    @staticmethod
    def _spread(options: Sequence[int], groups: Sequence[Sequence[int]]) -> Choice:
        spread = [0] * sum(len(group) for group in groups)
        for option, group in zip(options, groups, strict=True):
            for i in group:
                spread[i] = option
        return tuple(spread)

    def _budget(self) -> int:
        for i, name in enumerate(self.names):
            if all(cost >= _IMPOSSIBLE for cost in self.costs[i]):
                out, in_ = self.shapes[name]
                raise PlanError(
                    f"{name} ({out}x{in_}) allows no option of the menu {', '.join(self.settings.menu)}; add 'dense' or another pattern"
                )
        for o, option in enumerate(self.menu):
            if all(costs[o] >= _IMPOSSIBLE for costs in self.costs):
                raise PlanError(f"no weight of this model allows the menu option {option}; drop it")
        budget = (
            self.settings.bytes * 8
            if self.settings.bytes is not None
            else self._bits_of(self.settings.compression or 0.0)
        )
        if sum(min(options) for options in self.costs) > budget:
            raise PlanError(self._infeasible())
        return budget

    def _bits_of(self, compression: float) -> int:
        return int((1 - compression) * sum(out * in_ for out, in_ in self.shapes.values()) * REFERENCE_BITS)

    def _infeasible(self) -> str:
        least = sum(min(options) for options in self.costs)
        total = sum(out * in_ for out, in_ in self.shapes.values()) * REFERENCE_BITS
        wanted = (
            f"{self.settings.bytes} bytes"
            if self.settings.bytes is not None
            else f"compression {self.settings.compression:.4f}"
        )
        return (
            f"{wanted} by counting {self.settings.counting} is out of reach of the menu {', '.join(self.settings.menu)}; "
            f"the nearest feasible is compression {1 - least / total:.4f} ({-(-least // 8)} bytes)"
        )

    def _by_magnitude(self, name: str, option: WeightSpec) -> tuple[Tensor, float | None]:
        weight = self.probe.layer(name).weight.detach().float()
        scale = self.one_shot.statistics[name].input_scale if option.input_bits else None
        return PROJECTIONS["joint"](weight, option), scale

    def _score(
        self, installed: Mapping[str, tuple[Tensor, float | None]], metric: str, labels: Sequence[np.ndarray]
    ) -> tuple[float, float]:
        found, loss = [], 0.0
        with self.probe.installed(installed):
            for wanted, batch in zip(self.wanted, self.held_out, strict=True):
                outputs = self.probe.outputs(batch)
                loss += divergence(wanted, outputs)
                found.append(outputs.cpu().numpy())
        return metric_named(metric)(np.concatenate(found), np.concatenate(labels)), loss

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - began, 3)


_IMPOSSIBLE = 2**60  # cost of an option that a weight's size does not allow: no budget reaches it


def _bits(option: WeightSpec, shape: tuple[int, int], counting: str) -> int:
    if option.pattern and shape[1] % option.pattern.m:
        return _IMPOSSIBLE
    return option.stored_bits(shape, counting)


def _loss(entry: Entry | None, kind: str, mean: float) -> float:
    """Scaled sensitivity; an impossible option has no entry and costs everything. Noise below zero counts as zero."""
    return float("inf") if entry is None else max(0.0, getattr(entry, kind)) / mean


def write_trials(file: Path, trials: Sequence[Trial]) -> None:
    """Write ``trials.csv``, best first."""
    rows = [trial.row() for trial in sorted(trials, key=lambda trial: trial.joint)]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
