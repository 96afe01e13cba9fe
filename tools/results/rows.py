"""Which rows there are: each a name, how its plan is made, and what it changes in `Settings`.

A row's name says all about it: ``dense``, ``dense-longer``, ``RECIPE-OPTION`` as in ``nxm-2:4+W8``, the same with
changes (`CHANGES`) behind it as in ``nxm-2:4+W4-permuted-activation``, or ``searched-COUNTING-PERCENT`` and
``paper-search-COUNTING-PERCENT`` as in ``searched-hw-87.5``. So every recipe can be measured at every option;
`STANDARD` are those that the table is about, in its order. Weights are those of the last step, but for rows
``-averaged``, which have what `nxm compress` does by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from nxm_export.contract.plan import COUNTINGS, WeightSpec
from nxm_export.errors import NxmError, PlanError

SEARCHED_RECIPE = "obs"  # by which plans that were searched for are trained
RECIPE_TITLES = {
    "obs": "second-order mask and start + masked QAT",
    "admm": "layer-wise ADMM: mask, start and scales + masked QAT",
    "obs-refit": "second-order mask, refitted start and scales + masked QAT",
    "nxm": "ADMM + masked QAT",
    "magnitude": "fixed magnitude mask + masked QAT",
    "sr-ste": "SR-STE + masked QAT",
    "one-shot": "one-shot magnitude + PTQ",
    "paper": "paper recipe",
}


class LossChanges(TypedDict, total=False):
    """Terms of `compressors.settings.Losses` that differ."""

    task: float
    hidden: float


class SettingChanges(TypedDict, total=False):
    """Fields of `compressors.settings.Settings` that differ."""

    recipe: str
    admm: str
    mask_scores: str
    permute: bool
    augment: float
    average: float
    output_limit: float | None
    learning_rate: float
    epochs: float
    steps: int
    distill: bool


class SearchChanges(TypedDict, total=False):
    """Fields of `compressors.search.settings.SearchSettings` that differ."""

    samples: int
    held_out: int


@dataclass(frozen=True)
class Change:
    """An ablation: its title, which `Settings` differ, which terms of the loss, which arguments of
    `Family.uniform_plan`, which `SearchSettings`, and which share of all samples has no labels."""

    title: str
    settings: SettingChanges = field(default_factory=SettingChanges)
    losses: LossChanges = field(default_factory=LossChanges)
    plan: Mapping[str, str] = field(default_factory=dict)
    search: SearchChanges = field(default_factory=SearchChanges)
    more_text: float | None = None


CHANGES = {  # by what a row's name ends in
    "admm": Change("masks by ADMM", {"recipe": "nxm"}),
    "by-admm": Change(  # as many samples as it was by default when the first of them were measured
        "by layer-wise ADMM, also in the search's table",
        {"recipe": "admm"},
        search={"samples": 16, "held_out": 16},
    ),
    "unaugmented": Change("no distorted sentences", {"augment": 0.0}),
    "averaged": Change("weights averaged over the last tenth of the steps", {"average": 0.1}),
    "int8-outputs": Change("every output in INT8, whatever it costs", {"output_limit": None}),
    "slow": Change("learning rate 1e-4", {"learning_rate": 1e-4}),
    "fast": Change("learning rate 3e-4", {"learning_rate": 3e-4}),
    "labelled": Change("the task's own loss, too, layers a tenth as much", losses={"task": 0.5, "hidden": 1.0}),
    "permuted": Change("channels permuted", {"permute": True}),
    "activation": Change("masks weighted by activations", {"mask_scores": "activation"}),
    "joint": Change("ADMM on pattern and grid, float forward", {"admm": "joint"}),
    "joint-ste": Change("ADMM on pattern and grid, quantized forward", {"admm": "joint-ste"}),
    "logits": Change("distilled from logits, not from layers", losses={"hidden": 0.0}),
    "taught": Change("distilled alone, without the task's own loss", losses={"task": 0.0}),
    "layers": Change("distilled alone, layers ten times as much", losses={"task": 0.0, "hidden": 10.0}),
    "alone": Change("not distilled", {"distill": False}),
    "18-epochs": Change("18 epochs", {"epochs": 18.0}),
    "one-epoch": Change("one epoch", {"epochs": 1.0}),
    "untrained": Change("not trained", {"steps": 0}),
    "thorough": Change("searched with 256 sentences, judged on 256", search={"samples": 256, "held_out": 256}),
    "judged-by-64": Change("64 sentences judge the search", search={"held_out": 64}),
    "more-text": Change("half of the samples are texts of other sets, without labels", more_text=0.5),
    "much-more-text": Change("80 % of the samples are texts of other sets, without labels", more_text=0.8),
    "attention": Change("products inside attention in INT8, too", plan={"placement": "attention"}),
    "table": Change("word-embedding table in INT8, too", plan={"embedding": "int8"}),
}
_RECIPES = ("admm", "by-admm")  # changes of the recipe by which a searched plan is trained
_TRAINING = ("unaugmented", "averaged", "int8-outputs", "untrained")  # changes that baselines are measured with, too
STANDARD = (
    "dense",
    "dense-longer",
    "one-shot-2:4+W8",
    "magnitude-2:4+W8",
    "sr-ste-2:4+W8",
    "paper-2:4+W8",
    "nxm-2:4+W8",
    "obs-2:4+W8",
    "one-shot-2:4+W4",
    "magnitude-2:4+W4",
    "sr-ste-2:4+W4",
    "paper-2:4+W4",
    "nxm-2:4+W4",
    "obs-2:4+W4",
    "obs-refit-2:4+W4",
    "admm-2:4+W4",
    "obs-W4",
    "obs-1:4+W4",
    "searched-hw-87.5",
    "searched-values-87.5",
    "searched-hw-90",
    "paper-search-hw-87.5",
)


@dataclass(frozen=True)
class Row:
    """One row. `option` is the uniform plan's, `search` (method, counting, compression) a searched one's."""

    name: str
    title: str
    recipe: str | None = None
    option: str | None = None
    search: tuple[str, str, float] | None = None
    changes: tuple[str, ...] = ()

    @property
    def is_dense(self) -> bool:
        """True for the rows that compress nothing."""
        return self.recipe is None

    @property
    def settings(self) -> SettingChanges:
        """The settings that this row changes, but for its loss."""
        changed: SettingChanges = {} if self.recipe is None else {"recipe": self.recipe}
        for change in self.changes:
            changed.update(CHANGES[change].settings)
        return changed

    @property
    def losses(self) -> LossChanges:
        """The terms of the loss that this row changes."""
        changed: LossChanges = {}
        for change in self.changes:
            changed.update(CHANGES[change].losses)
        return changed

    @property
    def plan(self) -> dict[str, str]:
        """How its uniform plan differs from the default one: arguments of `Family.uniform_plan`."""
        return {name: value for change in self.changes for name, value in CHANGES[change].plan.items()}

    @property
    def searching(self) -> SearchChanges:
        """How its search differs from the default one."""
        changed: SearchChanges = {}
        for change in self.changes:
            changed.update(CHANGES[change].search)
        return changed

    @property
    def more_text(self) -> float | None:
        """The share of its samples that has no labels; None where all have one."""
        return next((CHANGES[change].more_text for change in self.changes if CHANGES[change].more_text), None)

    @property
    def training(self) -> tuple[str, ...]:
        """Those of its changes that baselines are measured with, too."""
        return tuple(change for change in self.changes if change in _TRAINING)

    @property
    def is_plain(self) -> bool:
        """True if it changes nothing but what baselines change, too, and how the masks of a searched plan are found."""
        return set(self.changes) <= {*_RECIPES, *_TRAINING}

    @property
    def moved(self) -> set[str]:
        """Names of the settings that are this row's own: those that it changes, and those that follow from them."""
        follow = self.recipe in ("paper", "one-shot") or {"augment", "distill"} & set(self.settings)
        losses = {"losses"} if self.losses else set()
        ranges = {"percentile"} if self.settings.get("steps") == 0 else set()  # `Settings.range_percentile`
        return {"learning_rate", *self.settings} | losses | ranges | ({"losses", "augment"} if follow else set())

    @property
    def slug(self) -> str:
        """The name as part of a file name on any system."""
        return self.name.replace(":", "of")

    @property
    def baseline(self) -> str | None:
        """The magnitude row of the same option and training; for searched plans that at 2:4+W4."""
        same = self.training
        if self.is_dense or (self.recipe == "magnitude" and self.changes == same):
            return None
        return "-".join([f"magnitude-{self.option or '2:4+W4'}", *same])


def row_named(name: str) -> Row:
    """The row of this name; raises `PlanError` with what there is."""
    if name == "dense":
        return Row(name, "dense")
    if name == "dense-longer":
        return Row(name, "dense, trained on as long as compression takes")
    plain = name
    changes: list[str] = []
    while ending := _ending(plain, changes):
        plain, changes = plain.removesuffix(f"-{ending}"), [ending, *changes]
    titles = [CHANGES[change].title for change in changes]
    for prefix, method in (("paper-search-", "paper"), ("searched-", "nxm")):
        counting, _, percent = plain.removeprefix(prefix).rpartition("-")
        if plain.startswith(prefix) and counting in COUNTINGS and _is_percent(percent):
            by = "the paper's search" if method == "paper" else "searched"
            title = ", ".join([by, f"{percent} % by `{counting}`", *titles])
            recipe = next((CHANGES[name].settings["recipe"] for name in changes if name in _RECIPES), SEARCHED_RECIPE)
            return Row(name, title, recipe, None, (method, counting, float(percent) / 100), tuple(changes))
    for recipe in sorted(RECIPE_TITLES, key=len, reverse=True):
        if plain.startswith(f"{recipe}-"):
            try:
                option = WeightSpec.parse(plain.removeprefix(f"{recipe}-"))
            except NxmError as error:
                raise PlanError(f"row {name!r}: {error}") from error
            full = "-".join([recipe, str(option), *changes])
            title = ", ".join([f"{option}, {RECIPE_TITLES[recipe]}", *titles])
            return Row(full, title, recipe, str(option), changes=tuple(changes))
    raise PlanError(
        f"unknown row {name!r}; give dense, dense-longer, RECIPE-OPTION ({', '.join(RECIPE_TITLES)}; 2:4+W8 and the "
        f"like), searched-COUNTING-PERCENT or paper-search-COUNTING-PERCENT ({', '.join(COUNTINGS)}), "
        f"or all: {', '.join(STANDARD)}"
    )


def rows_named(names: str) -> list[Row]:
    """Rows of a list separated by commas, ``all`` being `STANDARD`; each once, in the order given."""
    split = [part.strip() for part in names.split(",") if part.strip()]
    expanded = [name for part in split for name in (STANDARD if part == "all" else (part,))]
    return list({row.name: row for row in map(row_named, expanded)}.values())


def position(name: str) -> tuple[int, str]:
    """Sort key: the standard rows in their order, others behind them by name."""
    return (STANDARD.index(name) if name in STANDARD else len(STANDARD), name)


def _ending(name: str, but: list[str]) -> str | None:
    """The longest of `CHANGES` that a name ends in, and that is not among those found already."""
    fitting = [change for change in CHANGES if name.endswith(f"-{change}") and change not in but]
    return max(fitting, key=len, default=None)


def _is_percent(text: str) -> bool:
    try:
        return 0 < float(text) < 100
    except ValueError:
        return False
