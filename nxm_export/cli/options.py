"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from nxm_export.contract.plan import PLACEMENTS, NMPattern
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import PlanError


class Positive(click.ParamType):
    """A finite number above 0."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or wrong usage."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not (math.isfinite(number) and number > 0):
            self.fail(f"{value} is not a positive number", param, ctx)
        return number


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --json."""
    return click.option("--json", is_flag=True, help="Print the result as JSON on stdout, and no progress.")(command)


def options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Several options as one decorator, shown in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


PLAN_OPTIONS = options(
    click.option(
        "--pattern", default="2:4", show_default=True, help="N:M kept of every M along the input axis, or 'none'."
    ),
    click.option("--weight-bits", default="8", show_default=True, help="2 to 8, or 'none' for unquantized weights."),
    click.option(
        "--placement",
        type=click.Choice(PLACEMENTS),
        default="inputs-outputs",
        show_default=True,
        help="Activation quantizers: before planned products; behind them, too; before all products, also attention's; all of these; the FFN's only.",
    ),
    click.option(
        "--residual",
        type=click.Choice(["float", "int8"]),
        default="float",
        show_default=True,
        help="What goes around the layers.",
    ),
    click.option(
        "--embedding",
        type=click.Choice(["float", "int8"]),
        default="float",
        show_default=True,
        help="How the word-embedding table is stored; int8 in `cpu` graphs and packed files.",
    ),
    click.option("--keep-dense", multiple=True, metavar="GLOB", help="Leave matching weights dense; may be repeated."),
)


DATA_OPTIONS = options(
    click.option("--task", type=click.Choice(list(TASKS)), default="classification", show_default=True),
    click.option("--train", metavar="FILE", help="TSV, CSV, JSONL, Parquet, CoNLL or SQuAD JSON, or a GLUE task name."),
    click.option("--dev", metavar="FILE", help="Held-out data, or the same GLUE task name."),
    click.option("--text", help="Column of the text.  [default: sentence, sentence1, text, ...]"),
    click.option("--text-pair", help="Column of the second text.  [default: sentence2, if there is one]"),
    click.option("--label", help="Column of the label.  [default: label]"),
    click.option("--train-limit", type=click.IntRange(min=1), help="Use a sample of this many training examples."),
    click.option("--revision", help="Branch, tag or commit of a hub model."),
)


def limit_of(number: float) -> float | None:
    """`Settings.output_limit`, where None is no limit: the record of a run is JSON, which knows no infinity."""
    if math.isnan(number):
        raise click.BadParameter("nan is no limit; give a number of nats, or inf for none")
    return None if math.isinf(number) else number


RECIPES = ("obs", "nxm", "magnitude", "sr-ste", "one-shot", "paper")  # as `compressors.settings` has them

TRAINING_OPTIONS = options(
    click.option(
        "--recipe",
        type=click.Choice(RECIPES),
        default="obs",
        show_default=True,
        help="Where masks come from: second-order pruning, ADMM, magnitude, ... (docs/search.md).",
    ),
    click.option(
        "--admm",
        type=click.Choice(["mask", "joint", "joint-ste"]),
        default="mask",
        show_default=True,
        help="ADMM's constraint set, for --recipe nxm.",
    ),
    click.option(
        "--mask-scores",
        type=click.Choice(["magnitude", "activation"]),
        default="magnitude",
        show_default=True,
        help="What other recipes choose masks by: |W|, or |W| times the size of each input.",
    ),
    click.option(
        "--permute", is_flag=True, help="Reorder channels where that changes nothing, so that N:M drops less."
    ),
    click.option(
        "--augment",
        type=click.FloatRange(0, 1, max_open=True),
        help="Share of training samples with tokens dropped, replaced and swapped. Where there are any, the teacher alone is "
        "learned from.  [default: 0.7 for classification, else 0]",
    ),
    click.option(
        "--output-limit",
        type=click.FloatRange(min=0),
        default=0.005,
        show_default=True,
        callback=lambda _, __, number: limit_of(number),
        help="The most that one INT8 output into the residual may cost, in nats; a costlier one stays in float. inf: all INT8.",
    ),
    click.option(
        "--epochs", type=Positive(), default=6.0, show_default=True, help="Epochs of compression, all phases together."
    ),
    click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of compression; wins over --epochs."),
    click.option(
        "--dense-epochs",
        type=Positive(),
        default=3.0,
        show_default=True,
        help="Epochs of dense fine-tuning, where it is needed.",
    ),
    click.option(
        "--dense-steps",
        type=click.IntRange(min=1),
        help="Optimizer steps of dense fine-tuning; wins over --dense-epochs.",
    ),
    click.option(
        "--learning-rate",
        type=Positive(),
        help="Of compression.  [default: 1e-4; with --augment, 3e-4 for recipes but obs, and less for models wider than 384]",
    ),
    click.option("--dense-learning-rate", type=Positive(), default=5e-5, show_default=True),
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Samples per optimizer step."
    ),
    click.option(
        "--max-length", type=click.IntRange(min=2), help="Longest input in tokens.  [default: what the model allows]"
    ),
    click.option("--distill/--no-distill", default=True, show_default=True, help="Learn from the dense model."),
    click.option(
        "--gelu", type=click.Choice(["erf", "tanh"]), help="Train and export this GELU.  [default: the model's own]"
    ),
    click.option("--train-embeddings", is_flag=True, help="Train embedding tables during compression, too."),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16"]),
        default="auto",
        show_default=True,
        help="Of training.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads of training.  [default: all cores]"),
)


def columns_of(text: str | None, pair: str | None, label: str | None) -> Any:
    """The columns of a data file, as --text, --text-pair and --label name them."""
    from nxm_export.data.examples import Columns

    return Columns(text, pair, label)


def shape_of(text: str) -> tuple[int, int]:
    """(batch, sequence) of a text such as 8x128."""
    batch, separator, sequence = text.lower().partition("x")
    if not separator or not batch.isdecimal() or not sequence.isdecimal() or not int(batch) or not int(sequence):
        raise click.BadParameter(f"{text!r} is not a shape; write batch x sequence, as in 8x128", param_hint="--shape")
    return int(batch), int(sequence)


def pattern_of(text: str) -> NMPattern:
    """The pattern that --pattern names."""
    try:
        return NMPattern.parse(text)
    except PlanError as error:
        raise click.BadParameter(str(error), param_hint="--pattern") from error


def numbers_of(text: str, option: str, what: str) -> tuple[int, ...]:
    """Whole numbers above 0, separated by commas."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{text!r} are no {what}; write them as in 8,16,32", param_hint=option)
    return tuple(int(part) for part in parts)
