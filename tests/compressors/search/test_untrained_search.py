"""Where nothing is trained afterwards, a search judges plans by the quantizers that such a model has: ranges of least
squared error, and channels that stick out evened out in front of 8-bit weights."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressors.models import load_model
from compressors.pruning.layerwise import MAGNITUDE
from compressors.quantization.even_channels import even_out_channels
from compressors.quantization.fake_quant import quant_linears
from compressors.quantization.prepare_bake import calibrate, prepare
from compressors.search.plan_search import search
from compressors.search.plan_selection import Selector
from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from compressors.training.phases import freeze_masks
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.records.search_result import read_search_result
from nxm_export.contract.tasks import task_named
from tests.compressors.search.commands import QUICK, nxm
from tests.support.probing import Probed, probed

CANDIDATES = ("W8", "2:4+W8", "W4", "dense")


@torch.no_grad()
def stick_out(opened: Probed) -> None:
    """Make one channel of what each FFN product reads far larger than the others, in the model's files, too."""
    family, model = opened.source.family, load_model(opened.source, task_named("classification"))
    for each in (opened.probe.model, model):
        for block in family.blocks(opened.source.config):
            each.get_parameter(f"{block}.{family.ffn_norm}.weight")[3] *= 40
            up = next(
                name
                for name in family.weights(opened.source.config)
                if family.role(name) == "ffn_up" and name.startswith(f"{block}.")
            )
            each.get_parameter(up)[5] *= 10
    model.save_pretrained(opened.source.path)  # type: ignore[operator]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Probed]:
    @cache
    def opened(family: str) -> Probed:
        made = probed(tmp_path_factory.mktemp("models"), family)
        stick_out(made)
        return made

    return opened


def selector(opened: Probed, *, even: bool) -> Selector:
    settings = SearchSettings(candidate_specs=CANDIDATES, compression=0.5, placement="inputs", embedding="float")
    known, judged = opened.batches(0, 24), opened.batches(24, 56)
    return Selector(
        opened.probe, opened.source.config, settings, known, judged, solver=MAGNITUDE, percentile=None, even=even
    )


@torch.no_grad()
def as_compressed(opened: Probed, plan: CompressionPlan) -> list[Tensor]:
    """What the model says that compression without training makes of a plan, its layers rounded one by one."""
    source, known = opened.source, opened.batches(0, 24)
    student = load_model(source, task_named("classification")).eval()
    prepare(student, plan, source.family, source.config)
    even_out_channels(student, plan, source.family, source.config, known)
    calibrate(student, known, None)
    freeze_masks(quant_linears(student))
    answers = []
    for batch in opened.batches(24, 56):
        answers.append(student(**{name: value for name, value in batch.items() if name != "labels"}).logits)
    return answers


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The mean distance of two models' logits."""
    return float(torch.cat([(a - b).abs().mean(dim=1) for a, b in zip(ours, theirs, strict=True)]).mean())


@pytest.mark.parametrize(
    ("family", "choice"),
    [
        *itertools.product(["bert", "modernbert", "nomic_bert"], ["W8", "2:4+W8", "W4", "mixed"]),
        *itertools.product(["nomic_bert"], ["gate in 4 bits", "gate dense"]),  # two weights read one tensor there
    ],
)
def test_a_plan_is_judged_as_the_model_that_it_makes(family: str, choice: str, models: Callable[[str], Probed]) -> None:
    opened = models(family)
    ours, plain = selector(opened, even=True), selector(opened, even=False)
    other = {"gate in 4 bits": "W4", "gate dense": "dense"}.get(choice)
    mixed = [CANDIDATES[(7 * number) % 4] for number in range(len(ours.names))]
    specs = {
        name: mixed[number] if choice == "mixed" else "W8" if other else choice
        for number, name in enumerate(ours.names)
    }
    if other:
        specs |= {name: other for name in ours.names if opened.source.family.role(name) == "ffn_gate"}
    taken = tuple(CANDIDATES.index(specs[name]) for name in ours.names)
    expected = as_compressed(opened, ours.plan_of(taken))
    near, far = apart(ours._outputs(taken), expected), apart(plain._outputs(taken), expected)
    # The two multiply in another order: codes that lie between two steps fall to either side now and then.
    assert near < 2e-3
    if choice in ("W8", "2:4+W8", "gate dense"):
        assert near < far / 10, "this model has channels to even out, so leaving that out must show"


def table(directory: Path) -> dict[tuple[str, str], float]:
    with (directory / "sensitivity.csv").open(newline="") as stream:
        return {(row["weight"], row["option"]): float(row["kl"]) for row in csv.DictReader(stream)}


def test_the_command_line_says_that_nothing_will_be_trained(models: Callable[[str], Probed], tmp_path: Path) -> None:
    dense, out = models("bert").source.path, tmp_path / "out"
    command = ("search", dense, "--train", dense.parent / "data" / "train.tsv", "--out", out, *QUICK)
    result = nxm(*command, "--steps", "0", "--recipe", "obs")
    assert result.exit_code == 0, result.output
    assert " --out RUN --recipe obs --steps 0" in " ".join(result.output.split())
    assert read_search_result(out / "search.json").cost.share_of_full_run is None


def test_a_search_knows_whether_its_plan_is_going_to_be_trained(
    models: Callable[[str], Probed], tmp_path: Path
) -> None:
    opened, costs = models("bert"), []
    train = opened.source.path.parent / "data" / "train.tsv"
    settings = SearchSettings(candidate_specs=("W8", "W4"), compression=0.8, samples=16, held_out=16, swaps=2)
    for steps in (0, 4):
        out = tmp_path / f"{steps}"
        training = Settings(steps=steps, recipe="obs", precision="fp32")
        search(
            str(opened.source.path),
            task="classification",
            train=str(train),
            out=out,
            settings=settings,
            training=training,
        )
        costs.append(table(out))
    untrained, trained = costs
    wide = [key for key in untrained if key[1].startswith("W8") and opened.source.family.role(key[0]).startswith("ffn")]
    assert wide
    assert sum(untrained[key] for key in wide) < sum(trained[key] for key in wide) / 2
    others = [key for key in untrained if key[1].startswith("W8") and key not in wide]
    assert any(untrained[key] != trained[key] for key in others), "other ranges, where nothing is evened out, too"
