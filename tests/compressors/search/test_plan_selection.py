"""Choices keep to every constraint, ties tie, better is never lost, and small problems agree with trying everything."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressors.models import load_model
from compressors.projections import project_joint, project_nm
from compressors.search.knapsack import choose
from compressors.search.plan_selection import Choice, Selector, Trial, _by_score, write_trials
from compressors.search.settings import COST_SHARE, DEFAULT_CANDIDATES, MIN_SAMPLES, SearchSettings
from compressors.search.weight_options import WeightOptions
from nxm_export.contract.plan import COUNTINGS, WeightSpec
from nxm_export.contract.tasks import task_named
from nxm_export.errors import DataError, PlanError
from tests.support.probing import Probed, probed

SIZES = {"samples": 24, "held_out": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    return probed(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def measured(model: Probed, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Selector]:
    """``measured(**settings)``: a selector with its table filled; tables of the same candidate specs and placement are
    made once."""
    tables: dict[tuple[Any, ...], Path] = {}

    def make(**settings: Any) -> Selector:
        selector = model.selector(**{"compression": 0.85, "swaps": 12, **SIZES, **settings})
        key = (settings.get("candidate_specs"), settings.get("placement"))
        selector.measure_sensitivities(tables.setdefault(key, tmp_path_factory.mktemp("table")))
        return selector

    return make


def every_trial(selector: Selector) -> list[Trial]:
    trials = [selector.trial(origin, choice) for origin, choice in selector.candidates(selector.budget).items()]
    return trials + selector.swaps(min(trials, key=lambda trial: trial.joint))


@pytest.mark.parametrize(
    ("counting", "compression"), [("hw", 0.85), ("hw", 0.875), ("packed", 0.86), ("values", 0.9), ("values", 0.9375)]
)
def test_every_plan_reaches_the_compression_in_its_counting(
    measured: Callable[..., Selector], counting: str, compression: float
) -> None:
    for trial in every_trial(measured(counting=counting, compression=compression)):
        assert trial.plan.compression(counting) >= compression, trial.origin


@pytest.mark.parametrize("counting", COUNTINGS)
def test_every_plan_keeps_to_a_budget_of_bytes(measured: Callable[..., Selector], counting: str) -> None:
    for trial in every_trial(measured(counting=counting, compression=None, bytes=10_500)):
        assert trial.plan.stored_bits(counting) <= 8 * 10_500, trial.origin


@pytest.mark.parametrize("placement", ["inputs", "inputs-outputs", "products", "attention", "ffn-only"])
def test_a_plan_is_counted_as_its_placement_makes_it(
    measured: Callable[..., Selector], model: Probed, placement: str
) -> None:
    """ffn-only keeps attention's matrices in 16 bit whatever the candidates are, and INT8 attention needs them
    quantized."""
    compression = 0.7 if placement == "ffn-only" else 0.8
    trials = every_trial(measured(placement=placement, compression=compression))
    for trial in trials:
        assert trial.plan.compression("hw") >= compression
        model.source.family.require_placement(trial.plan)
        roles = {model.source.family.role(name): spec for name, spec in trial.plan.weights.items()}
        if placement == "ffn-only":
            assert roles["query"].weight_bits is None
    assert (trials[0].plan.attention == "int8") == (placement in ("products", "attention"))


def test_the_free_choice_is_the_best_that_any_tie_allows(measured: Callable[..., Selector]) -> None:
    """By the table's own account: exact means no other choice within the budget is predicted to be better."""
    selector = measured()
    kl = selector.losses["kl"]
    total = {
        origin: sum(kl[i][o] for i, o in enumerate(c)) for origin, c in selector.candidates(selector.budget).items()
    }
    assert total["free, 0.0 fisher"] == pytest.approx(min(total.values()))
    rng = np.random.default_rng(0)
    for _ in range(3000):
        choice = tuple(int(o) for o in rng.integers(len(selector.candidate_specs), size=len(selector.names)))
        if selector.fits(choice, selector.budget):
            assert sum(kl[i][o] for i, o in enumerate(choice)) >= total["free, 0.0 fisher"] * (1 - 1e-12)


def test_tied_candidates_are_tied(measured: Callable[..., Selector], model: Probed) -> None:
    selector = measured()
    actual = selector.candidates(selector.budget)
    assert {origin.partition(",")[0] for origin in actual} == {"free", "by role", "by layer"}
    for origin, choice in actual.items():
        by_role: dict[str, set[str]] = {}
        by_layer: dict[str, set[str]] = {}
        for name, spec in selector.plan_of(choice).weights.items():
            by_role.setdefault(model.source.family.role(name), set()).add(str(spec))
            by_layer.setdefault(name.split(".")[3], set()).add(str(spec))
        if origin.startswith("by role"):
            assert all(len(options) == 1 for options in by_role.values())
        if origin.startswith("by layer"):
            assert all(len(options) == 1 for options in by_layer.values())
    assert len(by_role) == 6
    assert len(by_layer) == 2


def test_swaps_never_lose_the_best(measured: Callable[..., Selector]) -> None:
    selector = measured(swaps=40)
    origin, choice = list(selector.candidates(selector.budget).items())[-1]
    start = selector.trial(origin, choice)
    trials = selector.swaps(start)
    assert len({trial.choice for trial in trials} | {start.choice}) == len(trials) + 1, "nothing is tried twice"
    best = start
    for trial in trials:
        changed = [a != b for a, b in zip(trial.choice, best.choice, strict=True)]
        assert 1 <= sum(changed) <= 2, "a swap starts from the best so far"
        assert selector.fits(trial.choice, selector.budget)
        best = min(best, trial, key=lambda trial: trial.joint)
    assert best.joint < start.joint, "a candidate by layer can be improved on"


def test_a_joint_score_is_the_divergence_of_the_model_with_all_weights_replaced(
    measured: Callable[..., Selector], model: Probed
) -> None:
    selector = measured()
    choice = next(iter(selector.candidates(selector.budget).values()))
    trial = selector.trial("", choice)
    dense, changed = (load_model(model.source, task_named("classification")).eval() for _ in range(2))
    for name, spec in trial.plan.weights.items():
        layer = changed.get_submodule(name.removesuffix(".weight"))
        if spec.is_dense:
            continue
        value, scale = selector.one_shot(name, spec)
        layer.weight.data = value
        layer.register_forward_pre_hook(
            lambda _, args, s=scale: (torch.clamp(torch.round(args[0] / s), -128, 127) * s,)
        )
    total, samples = 0.0, 0
    for batch in model.batches(24, 56):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            p, q = (network(**inputs).logits.double().softmax(-1) for network in (dense, changed))
        total, samples = total + float((p * (p.log() - q.log())).sum()), samples + len(p)
    assert trial.joint == pytest.approx(total / samples, rel=1e-4)  # the same float32 passes, summed in another order


def test_the_front_never_crosses_itself(measured: Callable[..., Selector], tmp_path: Path) -> None:
    asked = (0.875, 0.7, 0.85, 0.8, 0.86)
    selection = measured(compression=0.84, pareto=asked).run(tmp_path)
    front = dict(zip(asked, selection.front, strict=True))
    joints = [front[compression].joint for compression in sorted(asked)]
    assert joints == sorted(joints), "more compression never does better"
    for compression, trial in front.items():
        assert trial.plan.compression("hw") >= compression
    assert front[0.8].joint <= selection.finalists[0].joint, "a plan serves every lower compression, too"


@pytest.mark.parametrize("placement", ["inputs", "attention"])
def test_int8_attention_leaves_queries_keys_and_values_no_float(model: Probed, placement: str) -> None:
    settings = SearchSettings(compression=0.6, placement=placement, candidate_specs=("dense", "W8"))
    options = WeightOptions(model.source.family, model.source.config, settings)
    without = {
        model.source.family.role(name)
        for name, (dense, _) in zip(options.names, options.options, strict=True)
        if dense is None
    }
    assert without == ({"query", "key", "value"} if placement == "attention" else set())


def test_weights_are_made_by_the_solver_and_those_of_the_paper_by_magnitude(model: Probed) -> None:
    spec = WeightSpec.parse("2:4")
    for method, by_magnitude in (("nxm", False), ("paper", True)):
        selector = model.selector(compression=0.4, candidate_specs=("2:4",), method=method, **SIZES)
        name = selector.names[0]
        nearest = project_nm(model.probe.model.get_parameter(name).detach(), spec.pattern)  # type: ignore[arg-type]
        assert torch.equal(selector.one_shot(name, spec)[0] != 0, nearest != 0) is by_magnitude


def test_both_sensitivities_weigh_the_same_and_each_end_of_the_mixes_follows_one(
    measured: Callable[..., Selector], monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = measured(candidate_specs=("2:4+W4", "W8", "dense"), compression=0.8)
    dense = selector.candidate_specs.index(WeightSpec.parse("dense"))
    possible = np.array([[spec is not None for spec in options] for options in selector.options])
    for losses in selector.losses.values():
        assert (losses[:, dense] == 0.0).all()
        compressed = np.delete(losses, dense, axis=1)[np.delete(possible, dense, axis=1)]
        assert compressed.mean() == pytest.approx(1.0)
    found = selector.candidates(selector.budget)

    def total(choice: Choice, kind: str) -> float:
        return float(sum(selector.losses[kind][i][o] for i, o in enumerate(choice)))

    for kind in ("kl", "fisher"):
        best = choose(selector.losses[kind].tolist(), selector.costs, selector.budget)
        assert min(total(other, kind) for other in found.values()) == pytest.approx(total(tuple(best), kind))
    asked: dict[int, list[float]] = {}  # mixes, by the number of groups
    with monkeypatch.context() as patch:
        patch.setattr(selector, "_solve", lambda mix, groups, _: asked.setdefault(len(groups), []).append(mix))
        selector.candidates(selector.budget)
    assert sorted(asked) == [2, 6, 12]  # tied by layer, tied by role, free
    for mixes in asked.values():
        assert (mixes[0], mixes[-1], sorted(mixes)) == (0.0, 1.0, mixes)
    choice = found["free, 0.0 fisher"]
    mean = (total(choice, "kl") + total(choice, "fisher")) / 2
    assert selector.trial("", choice).predicted == pytest.approx(mean)


def test_a_choice_fits_a_budget_and_a_latency_that_it_fills(measured: Callable[..., Selector]) -> None:
    table = latency_table(measured())
    free = measured(latencies=table, latency_ms=1e9)
    choice = free.candidates(free.budget)["free, 0.0 fisher"]
    bits = free.plan_of(choice).stored_bits("hw")
    assert [free.fits(choice, budget) for budget in (bits - 1, bits, bits + 1)] == [False, True, True]
    milliseconds = free.trial("", choice).milliseconds
    assert milliseconds is not None
    for limit, fits in ((milliseconds, True), (milliseconds * (1 - 1e-12), False)):
        limited = measured(latencies=table, latency_ms=limit)
        assert limited.fits(choice, bits) is fits


def test_a_run_ranks_by_what_was_measured_and_keeps_each_plan_once(
    measured: Callable[..., Selector], tmp_path: Path
) -> None:
    selector = measured(compression=0.84, finalists=3, swaps=6)
    told: list[tuple[str, int, int]] = []
    selector.progress = lambda stage, done, total: told.append((stage, done, total))
    selection = selector.run(tmp_path)
    joints = [trial.joint for trial in selection.trials]
    assert joints == sorted(joints)
    assert selection.evaluated == len(selection.trials)
    assert selection.front == []
    plans = [trial.plan for trial in selection.finalists]
    assert len(plans) == 3
    distinct = [
        trial for at, trial in enumerate(selection.trials) if trial.plan not in [t.plan for t in selection.trials[:at]]
    ]
    assert selection.finalists == distinct[:3]
    groups = selector.ties()
    assert set(selection.tied) == {"by role", "by layer"}
    for tie, trial in selection.tied.items():
        same = [t for t in selection.trials if all(len({t.choice[i] for i in group}) == 1 for group in groups[tie])]
        assert trial == same[0]
    assert set(selection.seconds) == {"statistics", "table", "knapsack", "joint check"}
    for stage in ("joint check", "swaps"):
        counted = [(done, total) for name, done, total in told if name == stage]
        assert counted
        assert counted == [(number + 1, len(counted)) for number in range(len(counted))]
    write_trials(tmp_path / "trials.csv", selection.trials)
    with (tmp_path / "trials.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["joint"]) for row in rows] == pytest.approx(joints)
    assert "milliseconds" not in rows[0]
    assert [json.loads(row["options"]) for row in rows] == [trial.plan.pattern_counts for trial in selection.trials]
    timed = replace(selection.trials[0], milliseconds=1.25)
    write_trials(tmp_path / "timed.csv", [timed])
    assert "milliseconds" in (tmp_path / "timed.csv").read_text().splitlines()[0].split(",")


def latency_table(selector: Selector) -> dict[str, dict[str, float]]:
    """What makes small options slow, so that latency and size pull in opposite directions."""
    cost = {"2:4+W4": 9.0, "W4": 8.0, "2:4+W8": 3.0, "W8": 2.0, "dense": 1.0}
    return {
        role: {option: ms * (1 + i / 10) for option, ms in cost.items()} for i, role in enumerate(selector.family.roles)
    }


def test_candidates_swaps_and_front_keep_to_the_latency_limit(
    measured: Callable[..., Selector], tmp_path: Path
) -> None:
    table = latency_table(measured())

    def milliseconds(selector: Selector, trial: Trial) -> float:
        return sum(table[selector.family.role(name)][str(spec)] for name, spec in trial.plan.weights.items())

    free = measured(compression=0.8)
    unlimited = min(milliseconds(free, trial) for trial in every_trial(free))
    limit = 0.8 * unlimited
    limited = measured(compression=0.8, latencies=table, latency_ms=limit)
    selection = limited.run(tmp_path)
    assert len(selection.trials) > 12
    for trial in selection.trials:
        assert milliseconds(limited, trial) <= limit, trial.origin
        assert trial.plan.compression("hw") >= 0.8, trial.origin
    with pytest.raises(PlanError, match=r"within the bytes the least is [\d.]+ ms"):
        measured(compression=0.8, latencies=table, latency_ms=1.0).candidates(limited.budget)


def test_the_least_latency_that_an_error_names_can_be_had(measured: Callable[..., Selector]) -> None:
    table = latency_table(measured())
    with pytest.raises(PlanError) as refused:  # before anything is measured
        measured(compression=0.8, latencies=table, latency_ms=1.0)
    least = float(str(refused.value).split("the least is ")[1].split(" ms")[0])
    selector = measured(compression=0.8, latencies=table, latency_ms=least * 1.001)  # it is printed with four digits
    assert selector.candidates(selector.budget)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"query": {"W4": 1.0}}, "no number for query under 2:4\\+W4"),
        ({"query": 3}, "no number for query"),
        ({"query": dict.fromkeys(DEFAULT_CANDIDATES, "fast")}, "no number for query"),
        ({"query": dict.fromkeys(DEFAULT_CANDIDATES, float("nan"))}, "says nan ms"),
        ({"query": dict.fromkeys(DEFAULT_CANDIDATES, -1.0)}, "says -1.0 ms"),
    ],
)
def test_a_latency_table_with_holes_is_refused(model: Probed, table: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        model.selector(latencies=table, latency_ms=1.0, **SIZES)


def by_trying_everything(model: Probed, candidates: list[str], compression: float) -> list[tuple[float, float, Choice]]:
    """(-accuracy, divergence, choice) of every choice tied by role, with nothing but modules and projections."""
    selector = model.selector(candidate_specs=tuple(candidates), compression=compression, method="paper", **SIZES)
    specs, family = [WeightSpec.parse(option) for option in candidates], model.source.family
    dense, changed = (load_model(model.source, task_named("classification")).eval() for _ in range(2))
    batches, scored = model.batches(24, 56), []
    for options in itertools.product(range(len(candidates)), repeat=6):
        bits, scales = 0, {}
        for name, shape in selector.shapes.items():
            option = options[family.roles.index(family.role(name))]
            bits += specs[option].stored_bits(shape, "hw")
            scales[name] = (specs[option], selector.statistics[name].input_scale)
        if bits > (1 - compression) * 32 * sum(out * in_ for out, in_ in selector.shapes.values()):
            continue
        handles = []
        for name, (spec, scale) in scales.items():
            layer = changed.get_submodule(name.removesuffix(".weight"))
            weight = dense.get_parameter(name).detach()
            if spec.pattern and spec.weight_bits:
                layer.weight.data = project_joint(weight, spec.pattern, spec.weight_bits)
            elif spec.pattern:
                layer.weight.data = project_nm(weight, spec.pattern).half().float()
            if spec.weight_bits:
                handles.append(
                    layer.register_forward_pre_hook(
                        lambda _, args, s=scale: (torch.clamp(torch.round(args[0] / s), -128, 127) * s,)
                    )
                )
        right = divergence = 0.0
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.no_grad():
                p, q = (network(**inputs).logits.double().softmax(-1) for network in (dense, changed))
            right += int((q.argmax(-1) == batch["labels"]).sum())
            divergence += float((p * (p.log() - q.log())).sum())
        for handle in handles:
            handle.remove()
        samples = sum(len(batch["labels"]) for batch in batches)
        choice = tuple(options[family.roles.index(family.role(name))] for name in selector.names)
        scored.append((-right / samples, divergence / samples, choice))
    return sorted(scored)


def test_the_papers_enumeration_finds_what_trying_everything_finds(model: Probed) -> None:
    candidates = ["2:4+W4", "2:4"]
    expected = by_trying_everything(model, candidates, 0.8)
    assert 6 < len(expected) < 2**6, "the budget excludes some"
    selector = model.selector(candidate_specs=tuple(candidates), compression=0.8, method="paper", finalists=6, **SIZES)
    actual = selector.paper(
        "accuracy", [{"input_ids": [], "labels": label} for batch in selector.held_out for label in batch["labels"]]
    )
    assert actual.evaluated == len(expected)
    assert [trial.choice for trial in actual.finalists] == [choice for _, _, choice in expected[:6]]
    assert [trial.predicted for trial in actual.finalists] == [-score for score, _, _ in expected[:6]]
    # the same float32 passes; sums in another order
    assert [trial.joint for trial in actual.finalists] == pytest.approx([loss for _, loss, _ in expected[:6]], rel=1e-4)
    assert len({trial.origin for trial in actual.finalists}) == 6


def test_plans_whose_score_is_no_number_come_last() -> None:
    nan = float("nan")
    scored = [(0.9, 0.1, (0,)), (nan, 0.0, (1,)), (0.95, nan, (2,)), (0.95, 0.2, (3,)), (0.95, 0.2, (4,))]
    for order in itertools.permutations(scored):
        assert [choice for _, _, (choice,) in sorted(order, key=_by_score)] == [3, 4, 2, 0, 1]


@pytest.mark.parametrize("counting", COUNTINGS)
def test_the_nearest_feasible_that_an_error_names_is_feasible(model: Probed, counting: str) -> None:
    with pytest.raises(PlanError, match="is out of reach of the candidate specs") as refused:
        model.selector(compression=0.95, counting=counting, **SIZES)
    nearest, bytes_ = str(refused.value).split("nearest feasible is compression ")[1].split(" (")
    model.selector(compression=float(nearest), counting=counting, **SIZES)
    model.selector(compression=None, bytes=int(bytes_.split()[0]), counting=counting, **SIZES)
    with pytest.raises(PlanError, match="bytes by counting"):
        model.selector(compression=None, bytes=int(bytes_.split()[0]) - 1, counting=counting, **SIZES)


def test_a_front_out_of_reach_is_refused_before_anything_is_measured(model: Probed) -> None:
    with pytest.raises(PlanError, match=r"compression 0\.97 by counting hw is out of reach"):
        model.selector(compression=0.8, pareto=(0.8, 0.97), **SIZES)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"candidate_specs": ("2:4+W4", "3:7+W4", "dense")},
            PlanError,
            r"no weight of this model allows the candidate spec 3:7\+W4",
        ),
        ({"candidate_specs": ("3:64+W4",)}, PlanError, r"query\.weight \(32x32\) allows none of the candidate specs"),
        ({"candidate_specs": ("2:4+W4", "")}, PlanError, "not a weight option: ''"),
        (
            {"candidate_specs": ("dense",), "placement": "attention"},
            PlanError,
            "allows none of the candidate specs dense",
        ),
        ({"counting": "flattering"}, PlanError, "unknown counting"),
        ({"method": "guess"}, PlanError, "unknown method"),
        ({"compression": 0.0}, PlanError, "a share between 0 and 1"),
        ({"compression": 87.5}, PlanError, "a share between 0 and 1"),
        ({"compression": 0.8, "bytes": 9}, PlanError, "either a compression or a number of bytes"),
        ({"compression": None}, PlanError, "either a compression or a number of bytes"),
        ({"samples": 7}, DataError, "at least 8 calibration"),
        ({"halving": (0,)}, PlanError, "at least 1 step"),
        ({"latency_ms": 3.0}, PlanError, "go together"),
        ({"latencies": {"query": {}}}, PlanError, "go together"),
        ({"method": "paper", "pareto": (0.8,)}, PlanError, "drop --pareto"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    model: Probed, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.selector(**{**SIZES, **settings})


def test_an_option_that_some_weights_do_not_allow_is_used_by_the_others(
    measured: Callable[..., Selector], tmp_path: Path
) -> None:
    """Rows of 64 allow groups of 64, rows of 32 do not; layers then have no common option but the others."""
    selector = measured(candidate_specs=("16:64+W4", "W8", "W4"), compression=0.82)
    for trial in every_trial(selector):
        for name, spec in trial.plan.weights.items():
            assert selector.shapes[name][1] == 64 or spec.pattern is None
    # By values W4 alone comes to 87.5 %, so it takes the pattern, too.
    by_size = measured(candidate_specs=("16:64+W4", "W8", "W4"), compression=0.89, counting="values")
    assert any("16:64+W4" in trial.plan.pattern_counts for trial in every_trial(by_size))


def test_the_numbers_of_samples_follow_the_length_of_the_run() -> None:
    long, short = (SearchSettings().sized(6, 6, 60_000, trained) for trained in (60_000 * 6, 2_000 * 6))
    assert (long.samples, long.held_out) == (int(COST_SHARE * 2 * 360_000 / long.passes(6, 6)), 256)
    assert (short.samples, short.held_out) == (16, 64), "less would decide by chance, whatever it costs"
    middle = SearchSettings().sized(6, 6, 8_000, 8_000 * 6)
    assert (middle.samples, middle.held_out) == (int(COST_SHARE * 2 * 48_000 / middle.passes(6, 6)), 25 * 4)
    little = SearchSettings().sized(6, 6, 40, 10**6)
    assert (little.samples, little.held_out) == (10, 10), "a quarter of little data each"
    given = SearchSettings(samples=30).sized(6, 6, 10**6, 10**6)
    assert (given.samples, given.held_out) == (30, 120)
    for much in (SearchSettings(samples=900), SearchSettings(held_out=900)):  # what is left is enough for the other
        sized = much.sized(6, 6, 960, 10**6)
        assert sized.samples
        assert sized.held_out
        assert (sized.samples + sized.held_out, min(sized.samples, sized.held_out)) == (960, 60)
    too_much = SearchSettings(samples=960).sized(6, 6, 960, 10**6)
    assert (too_much.samples, too_much.held_out) == (960, MIN_SAMPLES), "the search says which to lower"
    assert SearchSettings(method="paper").sized(6, 6, 10**6, 10).held_out == 256
    assert SearchSettings(samples=99).sized(6, 6, 10**6, 10**6).samples == 99


def test_whole_plans_are_judged_in_bfloat16_where_they_are_trained_in_it(model: Probed, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits of a value, so a divergence moves by less than a quarter, and the order of plans that
    differ much stays. The table is measured in float32 whatever judges."""
    exact, rounded = (model.selector(bfloat16, **SIZES) for bfloat16 in (False, True))
    assert all(outputs.dtype == torch.float32 for outputs in rounded.reference)
    for selector in (exact, rounded):
        selector.measure_sensitivities(tmp_path / str(selector.bfloat16))
    np.testing.assert_array_equal(exact.losses["kl"], rounded.losses["kl"])
    count = len(exact.names)
    least, most = ([each.trial("", (option,) * count).joint for each in (exact, rounded)] for option in (3, 0))
    assert most[0] != most[1]
    assert most[1] == pytest.approx(most[0], rel=0.25)
    assert max(least) < min(most), "8 bits against 2:4 and 4 bits"
