"""``nxm search`` from the command line: what it writes, what can be done with it, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from compressors.models import load_model, load_tokenizer, resolve
from compressors.pruning.layer_inputs import Batches, second_moments
from compressors.pruning.layerwise import DRAFTS, MAGNITUDE, SECOND_ORDER, Solver
from compressors.search import one_shot
from compressors.search.plan_search import _enough, _notice_unpriced, _Runs, _sized, _typical_batches, solver_of
from compressors.search.plan_search import search as search_plan
from compressors.search.plan_selection import Trial
from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from compressors.training.task_data import TaskData, TaskDataRequest, read_task_data
from compressors.training.trainer import schedule
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import COUNTINGS, CompressionPlan, WeightSpec
from nxm_export.contract.records.latency_table import LatencySource, LatencyTable
from nxm_export.contract.records.search_result import read_search_result
from nxm_export.contract.tasks import TASKS
from nxm_export.data.features import Features
from tests.compressors.search.commands import QUICK, nxm, search
from tests.support import tiny
from tests.support.variants import variants


@pytest.fixture(scope="module")
def searched(desk: Path) -> Path:
    result = search(desk, desk / "searched", "--pareto", "0.8,0.87", "--halving", "2")
    assert result.exit_code == 0, result.output
    return desk / "searched"


def test_plans_are_judged_in_the_precision_of_training_and_the_table_is_not(desk: Path, tmp_path: Path) -> None:
    written = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        search_plan(
            desk / "dense",
            task="classification",
            train=str(desk / "train.tsv"),
            out=out,
            settings=SearchSettings(samples=24, held_out=24, swaps=0, compression=0.85),
            training=Settings(precision=precision, threads=1),
        )
        trials = (out / "trials.csv").read_text().splitlines()
        written.append(((out / "sensitivity.csv").read_text(), sorted(trials)))
    (table, exact), (same_table, rounded) = written
    assert table == same_table
    assert exact != rounded


def test_it_writes_the_plan_and_its_evidence(searched: Path) -> None:
    assert {file.name for file in searched.iterdir()} == {
        *("plan.json", "finalist-1.json", "finalist-2.json", "pareto-1.json", "pareto-2.json"),
        *("search.json", "trials.csv", "sensitivity.csv", "tied-by-role.json", "tied-by-layer.json"),
    }
    facts = json.loads((searched / "search.json").read_text())
    for tie, part in (("by role", slice(5, None)), ("by layer", slice(0, 4))):
        options: dict[tuple[str, ...], set[str]] = {}
        tied = CompressionPlan.load(searched / f"tied-{tie.replace(' ', '-')}.json")
        for name, spec in tied.weights.items():
            options.setdefault(tuple(name.split(".")[part]), set()).add(str(spec))
        assert all(len(chosen) == 1 for chosen in options.values()), tie
        assert facts["tied"][tie]["hw"] == pytest.approx(tied.compression("hw"), abs=1e-6)
    plan = CompressionPlan.load(searched / "plan.json")
    assert plan.compression("hw") >= 0.85
    assert {counting: facts["best"][counting] for counting in COUNTINGS} == {
        counting: pytest.approx(plan.compression(counting), abs=1e-6) for counting in COUNTINGS
    }
    assert facts["best"]["options"] == plan.pattern_counts
    with (searched / "sensitivity.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6 * tiny.LAYERS * 4
    assert all(float(row["kl"]) >= 0 and float(row["fisher"]) > 0 for row in rows)
    with (searched / "trials.csv").open(newline="") as stream:
        joints = [float(row["joint"]) for row in csv.DictReader(stream)]
    assert joints == sorted(joints)
    assert [row["asked"] for row in facts["pareto"]] == [0.8, 0.87]
    assert facts["pareto"][0]["joint"] <= facts["pareto"][1]["joint"]
    (round_,) = facts["rounds"]
    assert list(round_["scores"].values()) == sorted(round_["scores"].values())
    assert next(iter(round_["scores"])) == facts["best"]["origin"]
    assert not list(searched.parent.glob(".searched*")), "nothing of the work is left"


@pytest.mark.parametrize(
    ("recipe", "solver"),
    [
        ("admm", DRAFTS["admm"]),
        ("obs-refit", DRAFTS["obs-refit"]),
        ("obs", SECOND_ORDER),
        ("nxm", SECOND_ORDER),
        ("magnitude", MAGNITUDE),
        ("one-shot", MAGNITUDE),
    ],
)
def test_candidates_are_made_as_the_recipe_starts(recipe: str, solver: Solver) -> None:
    assert solver_of(recipe) is solver


def test_a_search_for_another_recipe_has_another_table(desk: Path, tmp_path: Path) -> None:
    costs = []
    for recipe in ("obs", "admm"):
        out = tmp_path / recipe
        search_plan(
            desk / "dense",
            task="classification",
            train=str(desk / "train.tsv"),
            out=out,
            settings=SearchSettings(
                samples=24, held_out=24, swaps=0, candidate_specs=("2:4+W4", "dense"), compression=0.5
            ),
            training=Settings(recipe=recipe, steps=2, max_length=48, threads=1),
        )
        with (out / "sensitivity.csv").open(newline="") as stream:
            costs.append(sum(float(row["fisher"]) for row in csv.DictReader(stream)))
    assert costs[1] < 0.95 * costs[0], "ADMM's weights have less error than those of second-order pruning"


@pytest.mark.parametrize(("samples", "taken"), [(8, 13), (16, 16), (90, 40)])
def test_weights_are_fitted_to_twice_as_many_tokens_as_the_widest_layer_reads_values(samples: int, taken: int) -> None:
    sentences: list[Features] = [{"input_ids": [number] * 10} for number in range(40)]  # 128 tokens: 13 sentences
    assert len(_enough(sentences, SearchSettings(samples=samples), 64)) == taken


@pytest.mark.parametrize("recipe", ["obs", "admm"])
def test_the_table_is_made_from_as_many_tokens_as_refitting_needs(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    read = list[int]()

    def watched(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, Tensor]:
        read.append(sum(int(batch["attention_mask"].sum()) for batch in batches))
        return second_moments(model, layers, batches)

    monkeypatch.setattr(one_shot, "second_moments", watched)
    search_plan(
        desk / "dense",
        task="classification",
        train=str(desk / "train.tsv"),
        out=tmp_path / "out",
        settings=SearchSettings(samples=8, held_out=8, swaps=0, candidate_specs=("2:4+W4", "dense"), compression=0.5),
        training=Settings(recipe=recipe, steps=2, threads=1),
    )
    enough = 2 * tiny.INTERMEDIATE
    assert read
    assert all(tokens >= enough for tokens in read) if recipe == "admm" else all(tokens < enough for tokens in read)


def test_what_refitting_takes_is_taken_from_the_samples(tmp_path: Path) -> None:
    """Of six matrices a block, four 32x32, one 64x32, one 32x64: an input has 40 values on average over the weights."""
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))
    sentences: list[Features] = [{"input_ids": [number] * 10} for number in range(4000)]
    data, asked = TaskData(TASKS["classification"], sentences, [], 0, None), SearchSettings()
    found = {
        recipe: _sized(asked, source, data, recipe, 300_000).samples or 0 for recipe in ("obs", "admm", "obs-refit")
    }
    # Two passes over twice the 64 tokens that the widest needs, and 22 x 40 tokens for each of four options.
    solving = (2 * 2 * 64 + 22 * 4 * 40) / 10
    fewer = solving / asked.passes(2, 6)
    assert fewer > 2
    assert found["obs"] - found["admm"] == pytest.approx(fewer, abs=1)
    assert found["obs-refit"] == found["admm"]


def test_texts_too_short_to_fit_weights_to_are_refused_as_compression_refuses_them(desk: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.tsv"
    short.write_text("sentence\tlabel\n" + "good\t1\nbad\t0\n" * 20)
    options = ("--samples", "8", "--held-out", "24", "--recipe", "obs-refit")
    result = nxm("search", desk / "dense", "--train", short, "--out", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert "needs at least as many tokens: give about" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_it_says_what_it_cost(searched: Path) -> None:
    cost = json.loads((searched / "search.json").read_text())["cost"]
    seconds = cost["seconds"]
    assert {
        "statistics",
        "table",
        "knapsack",
        "joint check",
        "pareto",
        "short runs of 2 steps",
        "all",
    } == seconds.keys()
    assert sum(seconds.values()) <= 2 * seconds["all"]
    assert cost["share_of_full_run"] == pytest.approx(seconds["all"] / cost["full_run"]["estimated_seconds"], rel=0.05)
    assert cost["full_run"]["steps"] == 6 * tiny.TRAIN_SAMPLES // 32
    assert not cost["resumed"]


def test_the_cost_of_a_full_run_is_estimated_on_batches_as_long_as_its_own() -> None:
    """Batches of training are of similar length; drawn at random they would be padded to twice the tokens."""
    lengths = np.random.default_rng(0).geometric(0.1, size=640)
    features: list[Any] = [{"input_ids": [7] * int(length)} for length in lengths]

    def tokens(batches: list[list[Any]]) -> float:
        return float(np.mean([len(batch) * max(len(sample["input_ids"]) for sample in batch) for batch in batches]))

    order = schedule(features, 20, 32, seed=0)
    epoch = [[features[i] for i in order[at : at + 32]] for at in range(0, 640, 32)]
    warm, *timed = _typical_batches(features, 32, seed=0)
    assert warm is timed[-1]
    assert tokens(timed) == pytest.approx(tokens(epoch), rel=0.15)  # five batches for twenty
    assert tokens([features[at : at + 32] for at in range(0, 640, 32)]) > 1.5 * tokens(timed)


@pytest.mark.parametrize("task", variants(TASKS, ("regression",), slow=("embedding", "question-answering")))
def test_every_task_can_be_searched(task: str, tmp_path: Path) -> None:
    model = tiny.write_model("bert", tmp_path / "model", head=task)
    train, _ = tiny.write_data(tmp_path, task)
    few = ("--samples", "8", "--held-out", "8", "--swaps", "2", "--candidates", "2:4+W8,W8", "--compression", "0.8")
    out = tmp_path / "searched"
    done = nxm(
        "search", model, "--task", task, "--train", train, *few, "--halving", "1", "--threads", "1", "--out", out
    )
    assert done.exit_code == 0, done.output
    assert CompressionPlan.load(out / "plan.json").compression("hw") >= 0.8


def test_compress_obeys_the_plan(desk: Path, searched: Path) -> None:
    out = desk / "compressed"
    plan = ("--plan", searched / "plan.json", "--steps", "4", "--batch-size", "16", "--threads", "1")
    data = ("--train", desk / "train.tsv", "--dev", desk / "dev.tsv")
    result = nxm("compress", desk / "dense", *data, *plan, "--out", out)
    assert result.exit_code == 0, result.output
    checkpoint = open_checkpoint(out)
    checkpoint.require_valid()
    assert checkpoint.plan == CompressionPlan.load(searched / "plan.json")
    assert len(checkpoint.plan.pattern_counts) >= 2


def test_compress_refuses_a_plan_for_another_model_before_it_trains(desk: Path, searched: Path, tmp_path: Path) -> None:
    other = tiny.write_model("bert", tmp_path / "other", hidden=64)
    data = ("--train", desk / "train.tsv", "--dev", desk / "dev.tsv", "--plan", searched / "plan.json")
    result = nxm("compress", other, *data, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "the plan is for another model: 12 weights differ" in result.output
    roberta = tiny.write_model("roberta", tmp_path / "roberta")
    result = nxm("compress", roberta, *data, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "the plan is for a bert model, this model is roberta" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"other", "roberta"}


def test_the_papers_search_reads_as_little_text_as_its_masks_need(desk: Path, tmp_path: Path) -> None:
    """They are those of the largest weights, whatever the recipe; no solver asks for many tokens."""
    header, *rows = (desk / "train.tsv").read_text().splitlines()
    same = {label: next(row for row in rows if row.endswith(label)) for label in ("0", "1")}
    (tmp_path / "few.tsv").write_text("\n".join([header, *(40 * list(same.values()))]) + "\n")
    command = ("search", desk / "dense", "--train", tmp_path / "few.tsv", "--candidates", "2:4+W4,W4", *QUICK)
    refused = nxm(*command, "--out", tmp_path / "ours")
    assert refused.exit_code == 1
    assert "--recipe obs takes fewer" in " ".join(refused.output.split())
    result = nxm(*command, "--out", tmp_path / "theirs", "--method", "paper")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"permute": True}, "without --permute: "),
        (
            {"recipe": "magnitude", "mask_scores": "activation", "permute": True},
            "without --permute and --mask-scores: ",
        ),
    ],
)
def test_what_no_plan_is_judged_by_is_said(changes: dict[str, Any], said: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _notice_unpriced(Settings(**changes))
    assert len(caught) == (said is not None)
    assert said is None or said in str(caught[0].message)


def test_the_papers_search_and_json(desk: Path, tmp_path: Path) -> None:
    result = search(
        desk, tmp_path / "out", "--method", "paper", "--candidates", "2:4+W4,W4", "--finalists", "3", "--json"
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts == json.loads((tmp_path / "out" / "search.json").read_text())
    assert facts["method"] == "paper"
    assert len(facts["finalists"]) == 3
    assert 3 < facts["plans_evaluated"] <= 2**6
    roles: dict[str, set[str]] = {}
    for name, spec in CompressionPlan.load(tmp_path / "out" / "plan.json").weights.items():
        roles.setdefault(name.partition(".layer.")[2][2:], set()).add(str(spec))
    assert all(len(options) == 1 for options in roles.values()), "tied by role"
    assert not (tmp_path / "out" / "sensitivity.csv").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--compression", "0.95"), 1, "the nearest feasible is compression 0.8"),
        (("--compression", "0"), 1, "a share between 0 and 1, as in 0.875; got 0.0"),
        (("--compression", "0.8", "--bytes", "9000"), 1, "either a compression or a number of bytes"),
        (("--candidates", "2:4+W4,5:7+W4"), 1, "no weight of this model allows the candidate spec 5:7+W4; drop it"),
        (("--candidates", "2:4+W9"), 1, "weight_bits must be 2 to 8"),
        (("--candidates", "2:4,,W4"), 1, "not a weight option: ''"),
        (("--samples", "4"), 1, "at least 8 calibration and 8 held-out samples, got 4"),
        (("--samples", "0"), 2, "Invalid value for '--samples'"),
        (("--samples", "180"), 1, "192 training samples are too few for 180 calibration and 24 held-out samples"),
        (("--halving", "0"), 1, "at least 1 step"),
        (("--halving", "1.5"), 1, "not a list of whole numbers"),
        (("--pareto", "a"), 1, "not a list of finite numbers"),
        (("--pareto", "0.99"), 1, "compression 0.99 by counting hw is out of reach"),
        (("--latency-ms", "3"), 1, "go together"),
        (
            ("--latency-table", "missing.json", "--latency-ms", "3"),
            1,
            "missing.json: cannot be read (No such file or directory); a latency table is JSON",
        ),
        (("--task", "regression"), 1, "has no regression head"),
        (("--latency-table", "ms.json", "--latency-ms", "-1"), 2, "-1 is not a positive number"),
        (
            ("--latency-table", "ms.json", "--latency-ms", "2"),
            1,
            "and 2.0 ms together; within the bytes the least is 12 ms",
        ),
        (
            ("--method", "paper", "--latency-table", "ms.json", "--latency-ms", "2"),
            1,
            "the same for all matrices of a role",
        ),
        (("--epochs", "nan"), 2, "is not a finite number in plain digits"),
        (("--seed", "-1"), 2, "Invalid value for '--seed'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options_ms = dict.fromkeys(("2:4+W4", "W4", "2:4+W8", "W8", "dense"), 1)
    roles = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
    (tmp_path / "ms.json").write_text(json.dumps(dict.fromkeys(roles, options_ms)))
    result = search(desk, tmp_path / "out", *options)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["ms.json"], "nothing is left behind"


def test_milliseconds_are_reported_where_a_latency_table_was_given(desk: Path, tmp_path: Path) -> None:
    faster = {"2:4+W4": 1, "W4": 2, "2:4+W8": 1, "W8": 2, "dense": 4}
    roles = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
    (tmp_path / "ms.json").write_text(json.dumps(dict.fromkeys(roles, faster)))
    result = search(desk, tmp_path / "out", "--latency-table", str(tmp_path / "ms.json"), "--latency-ms", "20")
    assert result.exit_code == 0, result.output
    facts, plan = json.loads((tmp_path / "out" / "search.json").read_text()), tmp_path / "out" / "plan.json"
    options = [str(spec).partition("/")[0] for spec in CompressionPlan.load(plan).weights.values()]
    assert facts["best"]["milliseconds"] == sum(faster[option] for option in options) <= 20
    assert facts["budget"]["latency_source"] is None
    assert " ms " in result.output
    assert "Milliseconds: of a table by hand" in result.output


def test_a_search_says_where_its_milliseconds_are_from_and_takes_those_of_its_own_matrices(
    desk: Path, tmp_path: Path
) -> None:
    family, config = FAMILIES["bert"], json.loads((desk / "dense" / "config.json").read_text())
    sizes = {family.role(name): shape for name, shape in family.weights(config).items()}
    times = dict.fromkeys(("2:4+W4", "W4", "2:4+W8", "W8", "dense"), 1.0)
    source = LatencySource(
        "per-node times of ONNX Runtime on the CPU x", "ort", "x", 2, 1, 32, ("0" * 64,), {}, "bert", sizes
    )
    table = LatencyTable(dict.fromkeys(family.roles, times), source)
    (tmp_path / "ms.json").write_text(table.to_text())
    limited = ("--latency-table", str(tmp_path / "ms.json"), "--latency-ms", "20")
    result = search(desk, tmp_path / "out", *limited)
    assert result.exit_code == 0, result.output
    assert f"Milliseconds: {source}." in " ".join(result.output.split())
    assert read_search_result(tmp_path / "out" / "search.json").budget.latency_source == source
    other = replace(table, source=replace(source, matrices={**sizes, "key": (1024, 1024)}))
    (tmp_path / "ms.json").write_text(other.to_text())
    result = search(desk, tmp_path / "other", *limited)
    assert result.exit_code == 1, result.output
    assert "the latency table is of bert with key of (1024, 1024), and bert.encoder.layer.0" in result.output
    assert not (tmp_path / "other").exists()


def test_a_plan_that_nothing_is_trained_for_has_no_share_of_a_training_run(desk: Path, tmp_path: Path) -> None:
    few = ("--samples", "8", "--held-out", "8", "--swaps", "0", "--candidates", "2:4+W8,W8", "--compression", "0.8")
    result = search(desk, tmp_path / "out", "--recipe", "one-shot", quick=few)
    assert result.exit_code == 0, result.output
    assert "the compression that it is for trains nothing" in " ".join(result.output.split())
    cost = json.loads((tmp_path / "out" / "search.json").read_text())["cost"]
    assert cost["full_run"] == {"steps": 0, "estimated_seconds": 0.0}
    assert cost["share_of_full_run"] is None
    refused = search(desk, tmp_path / "other", "--recipe", "one-shot", "--halving", "2", quick=few)
    assert refused.exit_code == 1
    assert "(--halving) train" in " ".join(refused.output.split())


def test_groups_stay_together_and_what_was_held_out_is_what_is_said(desk: Path, tmp_path: Path) -> None:
    model = tiny.write_model("bert", tmp_path / "model", head="reranking")
    train, _ = tiny.write_data(tmp_path, "reranking")  # four samples a group
    few = ("--samples", "8", "--held-out", "9", "--swaps", "0", "--candidates", "2:4+W8,W8", "--compression", "0.8")
    command = ("search", model, "--task", "reranking", *few, "--recipe", "one-shot", "--threads", "1")
    assert nxm(*command, "--train", train, "--out", tmp_path / "out").exit_code == 0
    facts = json.loads((tmp_path / "out" / "search.json").read_text())
    assert facts["samples"] == {"calibration": 8, "held_out": 12}
    header, *rows = train.read_text().splitlines()
    (tmp_path / "one.tsv").write_text(
        "\n".join([header, *("film\t" + row.split("\t", 1)[1] for row in rows[:40])]) + "\n"
    )
    refused = nxm(*command, "--train", tmp_path / "one.tsv", "--out", tmp_path / "new")
    assert refused.exit_code == 1
    assert "groups are not divided, and 0 are too few" in " ".join(refused.output.split())


def test_a_search_into_the_directory_that_one_stands_in_is_refused(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = nxm("search", desk / "dense", "--train", desk / "train.tsv", "--out", ".")
    assert refused.exit_code == 1
    assert ". would be replaced as a whole; name a new directory as --out" in " ".join(refused.output.split())


def test_a_short_run_takes_nothing_from_that_of_another_plan(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a plan stands among the finalists may differ, once a search is gone on with."""
    source, found = resolve(desk / "dense"), list[bool]()
    request = TaskDataRequest(TASKS["classification"], str(desk / "train.tsv"), str(desk / "dev.tsv"))
    data = read_task_data(source, request, load_tokenizer(source), Settings())
    dense = load_model(source, TASKS["classification"])

    class Finished:
        def __init__(self, *given: object) -> None:
            self.file = tmp_path / "round0-0" / "qat.safetensors"

        def run(self) -> tuple[nn.Module, None]:
            found.append(self.file.is_file())
            self.file.touch()
            return dense, None

    monkeypatch.setattr("compressors.search.plan_search.Job", Finished)
    runs = _Runs(source, data, dense, Settings(), tmp_path, lambda *_: None)
    for option in ("W8", "W8", "W4"):
        plan = source.family.uniform_plan(source.config, WeightSpec.parse(option))
        runs._short(Trial("free", plan, (), 0.0, 0.0), 2, tmp_path / "round0-0")
    assert found == [False, True, False]


def test_data_without_samples_are_refused(desk: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").write_text("sentence\tlabel\n")
    result = nxm("search", desk / "dense", "--train", tmp_path / "empty.tsv", "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 1
    assert "empty.tsv" in result.output


def test_a_directory_of_others_is_not_replaced_and_one_of_a_search_is(
    desk: Path, searched: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    result = search(desk, tmp_path / "mine")
    assert result.exit_code == 1
    assert "holds no earlier search" in result.output
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"
    assert "holds no earlier search" in search(desk, desk / "dense").output, "nor is a checkpoint"
    shutil.copytree(searched, tmp_path / "again")
    assert search(desk, tmp_path / "again", "--compression", "0.8", "--swaps", "0").exit_code == 0
    assert json.loads((tmp_path / "again" / "search.json").read_text())["budget"]["compression"] == 0.8
