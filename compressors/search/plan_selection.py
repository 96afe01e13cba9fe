"""Which option each weight gets: candidates from the sensitivity table, a joint check, swaps; or the authors'
enumeration.

    statistics -> sensitivity table -> exact knapsack, for several mixes of the two sensitivities
               -> joint check (what the table cannot see: interactions) -> budget-neutral swaps

A `Selector` decides on slices of the training data; `compressors.search.plan_search` cuts them and trains the
finalists. With ``method="paper"`` it is the authors' search: options tied across layers, every combination within the
budget scored one-shot by the task metric.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressors.pruning.layerwise import MAGNITUDE, SECOND_ORDER, Solver
from compressors.quantization.even_channels import evened, readers_to_even
from compressors.search.knapsack import Latency, choose
from compressors.search.one_shot import OneShot
from compressors.search.probe import Batches, SensitivityProbe
from compressors.search.sensitivity import Sensitivity, measure
from compressors.search.settings import MIXES, SearchSettings
from compressors.search.weight_options import WeightOptions
from compressors.settings import START_PERCENTILE
from compressors.training.output_divergence import divergence
from nxm_export.contract.plan import COUNTINGS, INT8_ATTENTION, CompressionPlan, WeightSpec
from nxm_export.contract.records.checkpoint_metrics import finite
from nxm_export.contract.records.search_result import PlanScore
from nxm_export.data.features import Features, filled, group_array, label_array
from nxm_export.data.metrics import metric_named
from nxm_export.errors import PlanError
from nxm_export.progress import Progress, silent

Choice = tuple[int, ...]  # index into the candidate specs, per weight in model order


@dataclass(frozen=True)
class Trial:
    """One plan that was looked at: where it came from, what the sensitivity table predicts, what it really does
    one-shot."""

    origin: str
    plan: CompressionPlan
    choice: Choice
    predicted: float
    joint: float
    milliseconds: float | None = None  # by the latency table, where one was given

    def score(self) -> PlanScore:
        """The plan as ``search.json`` has it."""
        return PlanScore(
            origin=self.origin,
            predicted=finite(self.predicted),
            joint=finite(self.joint),
            **{counting: round(self.plan.compression(counting), 6) for counting in COUNTINGS},
            options=self.plan.pattern_counts,
            milliseconds=None if self.milliseconds is None else round(self.milliseconds, 6),
        )


@dataclass(frozen=True)
class Selection:
    """Finalists and trials (best first), the front at further compressions, the best trial of each tie, and what it
    took."""

    finalists: list[Trial]
    trials: list[Trial]
    front: list[Trial]
    evaluated: int  # plans run on the held-out slice
    seconds: dict[str, float]
    tied: dict[str, Trial] = field(default_factory=dict)


class Selector(WeightOptions):
    """Chooses over one dense model: statistics, then `run` (or its steps `measure_sensitivities`, `candidates`,
    `swaps`), or `paper`.

    `solver` makes the weights of every candidate for what layers read on the batches `read` (None: those that
    calibrate); method ``paper`` takes them by magnitude. Ranges of inputs reach to the `percentile` of |x| (None: those
    of least squared error), and `even` says that channels are evened out (`compressors.quantization.even_channels`), as
    in a model that is not trained. Whole plans are judged in bfloat16 where `bfloat16` says so; the table, whose
    divergences are smaller, is always measured in float32.
    """

    def __init__(
        self,
        probe: SensitivityProbe,
        config: Mapping[str, object],
        settings: SearchSettings,
        calibration: Batches,
        held_out: Batches,
        progress: Progress = silent,
        solver: Solver = SECOND_ORDER,
        read: Batches | None = None,
        *,
        percentile: float | None = START_PERCENTILE,
        even: bool = False,
        bfloat16: bool = False,
    ) -> None:
        super().__init__(probe.family, config, settings)
        self.bfloat16 = bfloat16
        self.to_even = readers_to_even(probe.family, config) if even else []
        self.probe, self.progress = probe, progress
        self.calibration, self.held_out = calibration, held_out
        self.latency = self._latencies()
        for budget in (self.budget, *self.further_budgets):
            self._require_reachable(budget)
        self.seconds: dict[str, float] = {}
        with self._timed("statistics"):
            self.statistics = probe.statistics(calibration, percentile, self.to_even)
            self.compressed = {
                name: list(dict.fromkeys(spec for spec in options if spec is not None and not spec.is_dense))
                for name, options in zip(self.names, self.options, strict=True)
            }
            solver = MAGNITUDE if settings.method == "paper" else solver
            self.one_shot = OneShot(
                probe, self.statistics, calibration if read is None else read, self.compressed, solver
            )
            self.reference = self._judged()
        self.sensitivities: list[Sensitivity] = []
        self.losses: dict[str, np.ndarray] = {}  # by measure, (weights, options)

    def run(self, directory: Path) -> Selection:
        """Sensitivity table (finished parts of which are kept in `directory`), knapsack, joint check, swaps, front."""
        with self._timed("table"):
            self.measure_sensitivities(directory)
        with self._timed("knapsack"):
            candidates = self.candidates(self.budget)
        with self._timed("joint check"):
            trials = []
            for number, (origin, choice) in enumerate(candidates.items()):
                trials.append(self.trial(origin, choice))
                self.progress("joint check", number + 1, len(candidates))
            trials += self.swaps(_best(trials))
        front, others = list[Trial](), list[Trial]()
        if self.settings.pareto:
            with self._timed("pareto"):
                front, others = self.pareto(self.settings.pareto, trials)
        ranked, finalists = sorted(trials, key=_joint), list[Trial]()
        for trial in ranked:
            if all(trial.plan != other.plan for other in finalists):  # placement may make one plan of two choices
                finalists.append(trial)
        evaluated = len(trials) + len(others)
        tied = {
            tie: best[0]
            for tie, groups in self.ties().items()
            if tie != "free" and (best := [trial for trial in ranked if _is_tied(trial.choice, groups)])
        }
        return Selection(finalists[: self.settings.finalists], ranked, front, evaluated, self.seconds, tied)

    def measure_sensitivities(self, directory: Path) -> None:
        """Fill the sensitivity table and read the losses off it, each measure scaled to mean 1."""
        self.sensitivities = measure(
            self.probe,
            self.calibration,
            self.one_shot,
            self.compressed,
            directory,
            progress=lambda part, total: self.progress("sensitivity", part, total),
        )
        for kind in ("kl", "fisher"):
            by_option = {(entry.weight, entry.option): float(getattr(entry, kind)) for entry in self.sensitivities}
            mean = float(np.mean(list(by_option.values()) or [1.0])) or 1.0

            def loss(
                name: str, spec: WeightSpec | None, by_option: Mapping[tuple[str, str], float] = by_option
            ) -> float:
                if spec is None:
                    return np.inf
                return 0.0 if spec.is_dense else by_option[name, str(spec)]

            self.losses[kind] = np.array(
                [[loss(name, spec) for spec in options] for name, options in zip(self.names, self.options, strict=True)]
            )
            self.losses[kind] /= mean

    def candidates(self, budget: int) -> dict[str, Choice]:
        """Distinct choices within a budget of bits: the knapsack at several mixes, free, tied by role and tied by
        layer."""
        choices: dict[str, Choice] = {}
        for tie, groups in self.ties().items():
            for mix in np.linspace(0.0, 1.0, MIXES if tie == "free" else 3):
                choice = self._solve(float(mix), groups, budget)
                if choice is not None and choice not in choices.values():
                    choices[f"{tie}, {mix:.1f} fisher"] = choice
        return choices

    def pareto(self, compressions: Sequence[float], trials: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
        """(best trial at each of several compressions, every trial that this took), all from the one sensitivity table.

        A plan also serves every lower compression than its own, and so do `trials`: the front never crosses itself.
        """
        new: list[Trial] = []
        for number, compression in enumerate(compressions):
            choices = self.candidates(self._budget(compression))
            new += [self.trial(f"{compression:.4f}: {origin}", choice) for origin, choice in choices.items()]
            self.progress("pareto", number + 1, len(compressions))
        front = [
            _best([trial for trial in [*new, *trials] if self._cost(trial.choice) <= self._budget(compression)])
            for compression in compressions
        ]
        return front, new

    def swaps(self, best: Trial) -> list[Trial]:
        """Hill climbing: two weights change options within the constraints, which stays if that is jointly better."""
        rng = random.Random(self.settings.seed)
        seen, trials = {best.choice}, []
        for number in range(self.settings.swaps):
            self.progress("swaps", number + 1, self.settings.swaps)
            moves = [self._random_move(best.choice, rng) for _ in range(200)]
            moves = [move for move in moves if move not in seen and self.fits(move, self.budget)]
            if not moves:
                break
            move = min(moves, key=self._predicted)
            seen.add(move)
            trial = self.trial(f"swap {number + 1}", move)
            trials.append(trial)
            best = _best([best, trial])
        return trials

    def paper(self, metric: str, samples: Sequence[Features], classes: Sequence[str] = ()) -> Selection:
        """The authors' search: options tied by role, every combination in the budget scored one-shot by `metric`;
        `samples` are the held-out ones, in the order of their batches.

        As theirs, weights are projected by magnitude; unlike theirs, the score is on a slice of train, and ties of the
        metric go to the smaller divergence.
        """
        roles = self.ties()["by role"]
        tied = itertools.product(range(len(self.candidate_specs)), repeat=len(roles))
        choices = [self._spread(options, roles) for options in tied]
        feasible = [choice for choice in choices if self.fits(choice, self.budget)]
        scored = []
        labels, score_of = label_array(samples), metric_named(metric, classes, group_array(samples))
        with self._timed("enumeration"):
            for number, choice in enumerate(feasible):
                outputs = self._outputs(choice)
                loss = self._divergence(outputs)
                rows = [row for logits in outputs for row in logits.cpu().numpy()]
                score = score_of(filled(rows, 0.0), labels)
                scored.append((score, loss / len(samples), choice))
                self.progress("enumeration", number + 1, len(feasible))
        trials = [
            Trial(
                f"paper {place + 1}, {metric} {score:.4f}",
                self.plan_of(choice),
                choice,
                score,
                loss,
                self._reported_milliseconds(choice),
            )
            for place, (score, loss, choice) in enumerate(sorted(scored, key=_by_score)[: self.settings.finalists])
        ]
        return Selection(trials, trials, [], len(feasible), self.seconds)

    def trial(self, origin: str, choice: Choice) -> Trial:
        """Evaluate a choice jointly on the held-out slice: mean divergence from the dense model, one-shot."""
        total = self._divergence(self._outputs(choice))
        samples = sum(len(batch["input_ids"]) for batch in self.held_out)
        predicted, milliseconds = self._predicted(choice), self._reported_milliseconds(choice)
        return Trial(origin, self.plan_of(choice), choice, predicted, total / samples, milliseconds)

    def _divergence(self, outputs: Sequence[Tensor]) -> float:
        """Summed over the held-out samples, from what the dense model says."""
        pairs = zip(self.reference, outputs, strict=True)
        return sum(divergence(reference, actual, self.probe.output_kind) for reference, actual in pairs)

    def _outputs(self, choice: Choice) -> list[Tensor]:
        """Logits of every held-out batch, with all weights compressed one-shot as chosen."""
        specs = {name: spec for name, spec in self._specs(choice).items() if not spec.is_dense}
        uneven = set[str]()
        for readers in self.to_even:
            if not all(evened(specs[name]) for name in readers if name in specs):
                uneven.update(readers)
        weights = {name: self.one_shot(name, spec, even=name not in uneven) for name, spec in specs.items()}
        with self.probe.installed(weights):
            return self._judged()

    def _judged(self) -> list[Tensor]:
        """What the model says as it is, float32, for every held-out batch."""
        with torch.autocast(self.probe.device.type, torch.bfloat16, enabled=self.bfloat16):
            return [self.probe.outputs(batch).float() for batch in self.held_out]

    def _specs(self, choice: Choice) -> dict[str, WeightSpec]:
        specs = {}
        for name, options, option in zip(self.names, self.options, choice, strict=True):
            spec = options[option]
            assert spec is not None, f"{name} does not allow {self.candidate_specs[option]}"
            specs[name] = spec
        return specs

    def plan_of(self, choice: Choice) -> CompressionPlan:
        """The plan of a choice, with the output quantizers of the placement."""
        attention = "int8" if self.settings.placement in INT8_ATTENTION else "float"
        specs, embedding = self._specs(choice), self.settings.embedding
        return CompressionPlan(self.family.model_type, specs, self.shapes, attention, embedding=embedding)

    def ties(self) -> dict[str, list[list[int]]]:
        """Groups of weights (by index) that must take the same option: none, those of one role, those of one layer."""
        by_role: dict[str, list[int]] = {}
        by_layer: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            role = self.family.role(name)
            by_role.setdefault(role, []).append(i)
            by_layer.setdefault(self.family.block_of(name), []).append(i)
        return {
            "free": [[i] for i in range(len(self.names))],
            "by role": list(by_role.values()),
            "by layer": list(by_layer.values()),
        }

    def fits(self, choice: Choice, budget: int) -> bool:
        """Whether a choice keeps to a budget of bits and to the latency limit."""
        limit = self.settings.latency_ms
        return self._cost(choice) <= budget and (limit is None or self._milliseconds(choice) <= limit)

    def _solve(self, mix: float, groups: list[list[int]], budget: int) -> Choice | None:
        """The exact choice within the budget and the latency limit, of least loss at a mix of the two sensitivities;
        weights of a group take the same option. None where nothing fits."""
        possible = np.array([[spec is not None for spec in options] for options in self.options])
        losses = np.full(possible.shape, np.inf)
        losses[possible] = (1 - mix) * self.losses["kl"][possible] + mix * self.losses["fisher"][possible]
        limit = self.settings.latency_ms
        latency = None if limit is None else Latency(self._by_group(self.latency, groups), limit)
        try:
            return self._spread(choose(self._by_group(losses, groups), self._bits(groups), budget, latency), groups)
        except PlanError:
            return None

    def _bits(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Stored bits by group and option."""
        return [[sum(self.costs[i][o] for i in group) for o in range(len(self.candidate_specs))] for group in groups]

    def _by_group(self, values: np.ndarray, groups: Sequence[Sequence[int]]) -> list[list[float]]:
        """Sums of `values` (weights, options) by group and option."""
        return [[float(sum(values[i][o] for i in group)) for o in range(len(self.candidate_specs))] for group in groups]

    def _fastest(self, groups: Sequence[Sequence[int]], budget: int) -> Choice | None:
        """The choice of least latency within the budget; None where nothing fits it."""
        try:
            return self._spread(choose(self._by_group(self.latency, groups), self._bits(groups), budget), groups)
        except PlanError:
            return None

    def _require_reachable(self, budget: int) -> None:
        """Raise `PlanError`, before anything is measured, where nothing keeps to the budget, the latency limit and the
        paper's ties together."""
        by_paper = self.settings.method == "paper"
        groups = self.ties()["by role" if by_paper else "free"]
        least = self._fastest(groups, budget)
        tied = " that is the same for all matrices of a role" if by_paper else ""
        if least is None:
            raise PlanError(
                f"no choice of options{tied} fits {budget // 8} bytes; lower the compression or add options"
            )
        if not self.fits(least, budget):
            raise PlanError(
                f"no choice of options{tied} fits {budget // 8} bytes and {self.settings.latency_ms} ms together; "
                "within the bytes "
                f"the least is {self._milliseconds(least):.4g} ms: raise the latency limit or lower the compression"
            )

    def _latencies(self) -> np.ndarray:
        """Milliseconds (weights, options) from the latency table by role and option, for all uses of a weight; zero
        without a limit."""
        milliseconds = np.zeros((len(self.names), len(self.candidate_specs)))
        if self.settings.latency_ms is None:
            return milliseconds
        source = self.settings.latency_source
        for i, name in enumerate(self.names):
            role = self.family.role(name)
            if source is not None and source.matrices.get(role) != self.shapes[name]:
                raise PlanError(
                    f"the latency table is of {source.model_type} with {role} of {source.matrices.get(role)}, and "
                    f"{name} is {self.shapes[name]} (out, in): measure engines of this model (`nxm latency`)"
                )
            for o, spec in enumerate(self.options[i]):
                if spec is None:
                    continue
                try:
                    milliseconds[i, o] = float(self.settings.latencies[role][str(spec)]) * self.probe.uses[name]
                except (KeyError, TypeError, ValueError) as error:
                    raise PlanError(
                        f"the latency table has no number for {role} under {spec}; measure it, or drop it from the "
                        "candidate specs"
                    ) from error
                if not 0 <= milliseconds[i, o] < np.inf:
                    raise PlanError(
                        f"the latency table says {milliseconds[i, o]} ms for {role} under {spec}; measure it again"
                    )
        return milliseconds

    def _random_move(self, choice: Choice, rng: random.Random) -> Choice:
        moved = list(choice)
        for i in rng.sample(range(len(choice)), 2):
            moved[i] = rng.choice([o for o, spec in enumerate(self.options[i]) if spec is not None])
        return tuple(moved)

    def _predicted(self, choice: Choice) -> float:
        return float(sum(self.losses["kl"][i][o] + self.losses["fisher"][i][o] for i, o in enumerate(choice))) / 2

    def _cost(self, choice: Choice) -> int:
        return sum(self.costs[i][o] for i, o in enumerate(choice))

    def _milliseconds(self, choice: Choice) -> float:
        return float(sum(self.latency[i][o] for i, o in enumerate(choice)))

    def _reported_milliseconds(self, choice: Choice) -> float | None:
        return None if self.settings.latency_ms is None else self._milliseconds(choice)

    @staticmethod
    def _spread(options: Sequence[int], groups: Sequence[Sequence[int]]) -> Choice:
        spread = [0] * sum(len(group) for group in groups)
        for option, group in zip(options, groups, strict=True):
            for i in group:
                spread[i] = option
        return tuple(spread)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - began, 3)


def _is_tied(choice: Choice, groups: Sequence[Sequence[int]]) -> bool:
    """Whether all weights of a group have the same option, in every group."""
    return all(len({choice[i] for i in group}) == 1 for group in groups)


def _joint(trial: Trial) -> float:
    """What trials are ranked by; one whose outputs are no numbers comes last."""
    return trial.joint if math.isfinite(trial.joint) else math.inf


def _by_score(scored: tuple[float, float, Choice]) -> tuple[float, float, Choice]:
    """What plans with (score, divergence, choice) are ranked by, best first; numbers that are none come last."""
    score, loss, choice = scored
    return (-score if math.isfinite(score) else math.inf, loss if math.isfinite(loss) else math.inf, choice)


def _best(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=_joint)


def write_trials(file: Path, trials: Sequence[Trial]) -> None:
    """Write trials as CSV, in their order."""
    timed = [] if trials[0].milliseconds is None else ["milliseconds"]
    columns = ["origin", "predicted", "joint", *COUNTINGS, *timed, "options"]
    rows = [{**vars(trial.score()), "options": json.dumps(trial.plan.pattern_counts)} for trial in trials]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
