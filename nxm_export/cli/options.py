"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from compressors.search.settings import SearchSettings
from compressors.settings import Settings
from nxm_export.contract.choices import (
    AUTO_BACKEND,
    BACKEND_NAMES,
    PATTERN,
    PLACEMENT,
    STORAGE,
    STORAGES,
    TASK,
    WEIGHT_BITS,
)
from nxm_export.contract.options import Option, options_of
from nxm_export.contract.plain_numbers import real_number, size_of, whole_number
from nxm_export.contract.plan import PLACEMENTS, NMPattern
from nxm_export.contract.tasks import TASKS
from nxm_export.contract.token_budget import BATCH_TOKENS_HELP, MAX_BATCH_TOKENS
from nxm_export.errors import PlanError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from nxm_export.data.columns import Columns
    from nxm_export.data.more_text import MoreText

    FloatType = click.ParamType[float]
    TextType = click.ParamType[str]
    OptionType = click.ParamType[str] | click.ParamType[int] | click.ParamType[float]
else:
    FloatType = TextType = click.ParamType  # which older versions of click do not parametrize

RUN_BACKENDS = (AUTO_BACKEND, *BACKEND_NAMES)  # of a run
Command = TypeVar("Command", bound=Callable[..., object])
Record = TypeVar("Record", bound="DataclassInstance")


class Decorator(Protocol):
    """What adds an option, or several, to a command."""

    def __call__(self, command: Command, /) -> Command:
        """The command with the option."""


class Whole(click.IntRange):
    """A whole number in a range, in plain digits (`nxm_export.contract.plain_numbers`)."""

    name = "integer"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, or wrong usage."""
        number = whole_number(value) if isinstance(value, str) else value
        if number is None:
            self.fail(f"{value!r:.80} is not a whole number in plain digits", param, ctx)
        return int(super().convert(number, param, ctx))


class Real(click.FloatRange):
    """A finite number in a range, in plain digits; with `limitless` also ``inf``, which is no limit."""

    name = "number"

    def __init__(
        self,
        min: float | None = None,
        max: float | None = None,
        *,
        min_open: bool = False,
        max_open: bool = False,
        limitless: bool = False,
    ) -> None:
        super().__init__(min, max, min_open=min_open, max_open=max_open)
        self._limitless = limitless

    def _describe_range(self) -> str:  # click's own, which writes x<=None in the help where there is no bound
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or wrong usage."""
        if self._limitless and str(value) == "inf":
            return math.inf
        number = real_number(value) if isinstance(value, str) else value
        if number is None:
            self.fail(f"{value!r:.80} is not a finite number in plain digits", param, ctx)
        return float(super().convert(number, param, ctx))


class Positive(FloatType):
    """A finite number above 0, in plain digits."""

    name = "number"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or wrong usage."""
        number = real_number(value) if isinstance(value, str) else value
        if number is None:
            self.fail(f"{value!r:.80} is not a finite number in plain digits", param, ctx)
        if not number > 0:
            self.fail(f"{value} is not a positive number", param, ctx)
        return number


class Backends(TextType):
    """Names of backends, separated by commas, or ``auto`` alone; click's Choice takes one."""

    name = "backends"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, each of its names looked at, or wrong usage."""
        names = [name.strip() for name in value.split(",")]
        for name in names:
            if name not in RUN_BACKENDS:
                self.fail(f"{name!r} is not one of {', '.join(RUN_BACKENDS)}", param, ctx)
        if AUTO_BACKEND in names and len(names) > 1:
            self.fail(f"{AUTO_BACKEND} takes all that run here; give it alone", param, ctx)
        return ",".join(names)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names, behind those that stand there."""
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in RUN_BACKENDS if name.startswith(last)]


def json_option(command: Command) -> Command:
    """The option --json."""
    return click.option("--json", is_flag=True, help="Print the result as JSON, and no progress.")(command)


def all_option(command: Command) -> Command:
    """The option --all."""
    return click.option(
        "--all", "everything", is_flag=True, help="Every row; otherwise equal ones are one, and the rest is left out."
    )(command)


def options(*options: Decorator) -> Decorator:
    """Several options as one decorator, shown in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def batch_tokens_option(about: str = "") -> Decorator:
    """The option --max-batch-tokens, for what `about` says."""
    return click.option(
        "--max-batch-tokens",
        type=Whole(min=1),
        default=MAX_BATCH_TOKENS,
        show_default=True,
        help=f"{about}{BATCH_TOKENS_HELP}",
    )


def expect_sha256_option(command: Command) -> Command:
    """The option --expect-sha256; `expected_hashes` reads it."""
    return click.option(
        "--expect-sha256",
        multiple=True,
        metavar="HEX",
        help="Take only engines whose file, or whose contents, have this hash; may be repeated.",
    )(command)


def given_options(names: Sequence[str]) -> list[str]:
    """Those of the running command's options that were given to it, by the command line or a file, as they are
    written."""
    context = click.get_current_context()
    flags = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    return [flags[name] for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]


def expected_hashes(values: Mapping[str, object]) -> frozenset[str]:
    """The hashes of the option --expect-sha256."""
    given = values["expect_sha256"]
    return frozenset(str(digest).lower() for digest in given) if isinstance(given, tuple) else frozenset()


PLAN_OPTIONS = options(
    click.option(
        "--pattern",
        default=PATTERN,
        show_default=True,
        metavar="N:M",
        help="N kept of every M along the input axis, or none.",
    ),
    click.option(
        "--weight-bits",
        type=click.Choice(["none", *map(str, range(2, 9))]),
        default=str(WEIGHT_BITS),
        metavar="2..8|none",
        show_default=True,
        help="Bits of a weight; none: unquantized.",
    ),
    click.option(
        "--placement",
        type=click.Choice(PLACEMENTS),
        default=PLACEMENT,
        show_default=True,
        help="Activation quantizers: before planned products; behind them, too; before all products, also attention's; "
        "all of these; the FFN's only.",
    ),
    click.option(
        "--residual",
        type=click.Choice(STORAGES),
        default=STORAGE,
        show_default=True,
        help="Whether residual connections read quantized values.",
    ),
    click.option(
        "--embedding",
        type=click.Choice(STORAGES),
        default=STORAGE,
        show_default=True,
        help="How the word-embedding table is stored; int8 in `cpu` graphs and packed files.",
    ),
    click.option("--keep-dense", multiple=True, metavar="GLOB", help="Leave matching weights dense; may be repeated."),
)


PLAN_FILE_OPTION = click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A plan, in place of --pattern to --keep-dense.",
)
FORCE_OPTION = click.option("--force", is_flag=True, help="Overwrite what is at --out.")
LABEL_MAP_OPTION = click.option(
    "--label-map",
    metavar="LABEL=CLASS,...",
    help="Which class of the model a label of the data stands for, where it is not the class's name.",
)
COLUMN_OPTIONS = options(
    click.option("--text-column", "text", metavar="NAME", help="Column of the text.  [default: sentence, text, ...]"),
    click.option(
        "--pair-column", "text_pair", metavar="NAME", help="Column of the second text.  [default: sentence2, ...]"
    ),
)
LABELLED_COLUMN_OPTIONS = options(
    COLUMN_OPTIONS,
    click.option("--label-column", "label", metavar="NAME", help="Column of the label.  [default: label, labels, ...]"),
    LABEL_MAP_OPTION,
)
TASK_OPTION = click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    default=TASK,
    show_default=True,
    metavar="TASK",
    help=f"{', '.join(TASKS)}.",
)
TRAIN_LIMIT_OPTION = click.option(
    "--train-limit", type=Whole(min=1), help="Use a sample of this many training examples."
)
MORE_TEXT_OPTIONS = options(
    click.option(
        "--more-text",
        multiple=True,
        metavar="FILE",
        help="Texts without labels, as --train has them; the dense model answers them in training. May be repeated.",
    ),
    click.option(
        "--more-text-share",
        type=Real(0, 1, min_open=True, max_open=True),
        metavar="SHARE",
        help="Share of the samples of training that --more-text makes up, but for the first of every batch.  "
        "[default: 0.5]",
    ),
)
DATA_OPTIONS = options(
    TASK_OPTION,
    click.option(
        "--train",
        metavar="FILE",
        help="TSV, CSV, JSON, Parquet, CoNLL or SQuAD, .gz or not, or a GLUE task.",
    ),
    click.option("--dev", metavar="FILE", help="Held-out data, or the same GLUE task name."),
    LABELLED_COLUMN_OPTIONS,
    TRAIN_LIMIT_OPTION,
    MORE_TEXT_OPTIONS,
    click.option("--revision", help="Branch, tag or commit of a hub model."),
)


def setting_option(settings: type[DataclassInstance], name: str, **changes: str | None) -> Decorator:
    """The option of the command line that stands for a setting; `changes` are fields of its `Option`, such as another
    help."""
    entry = replace(dict(options_of(settings))[name], **changes)  # type: ignore[arg-type]  # texts, all of them
    annotation, default = get_type_hints(settings)[name], _defaults(settings)[name]
    flag = entry.flag or f"--{name.replace('_', '-')}"
    if annotation is bool:
        if entry.negates or not default:
            return click.option(flag, name, is_flag=True, help=entry.help)
        return click.option(
            f"{flag}/--no-{flag.removeprefix('--')}", name, default=True, show_default=True, help=entry.help
        )
    kind = _click_type(entry, _number_of(annotation))
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    if entry.scale != 1 and isinstance(default, (int, float)):
        default *= entry.scale
    callback = (lambda _, __, number: limit_of(number)) if entry.infinity_is_none else None
    return click.option(
        flag,
        name,
        type=kind,
        default=default,
        show_default=default not in (None, ""),
        metavar=entry.metavar,
        help=entry.help,
        callback=callback,
    )


def typed(kind: type[Record], values: Mapping[str, object]) -> Record:
    """The `values` of a command's options as a dataclass that has one field for each of them, of the same name.

    Click calls a command with keywords that no type checker knows. This is the one place where they get their types:
    what the command does with the fields is checked.
    """
    return kind(**{entry.name: values[entry.name] for entry in fields(kind)})


def settings_of(kind: type[Record], values: Mapping[str, object], **changes: object) -> Record:
    """The settings that the `values` of a command's options make; `changes` win over them. An option that the command
    lacks leaves its setting as it is."""
    made: dict[str, object] = {}
    for name, entry in options_of(kind):
        if name not in values:
            continue
        value, annotation = values[name], get_type_hints(kind)[name]
        if entry.negates:
            value = not value
        elif get_origin(annotation) is tuple:
            value = _listed(str(value), get_args(annotation)[0])
        elif entry.scale != 1 and isinstance(value, float):
            value = _number_of(annotation)(value / entry.scale)
        made[name] = value
    return kind(**{**made, **changes})


def limit_of(number: float) -> float | None:
    """A setting where None is no limit, of an option that takes inf for it: JSON, which a run records, knows no
    infinity."""
    return None if math.isinf(number) else number


def _defaults(settings: type[DataclassInstance]) -> dict[str, object]:
    return {entry.name: entry.default for entry in fields(settings)}


def _number_of(annotation: object) -> type:
    """int, float or str of an annotation such as ``float | None``; str of a tuple, whose items commas separate."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind in (int, float, str)]
    return kinds[0] if kinds and get_origin(annotation) is not tuple else str


def _click_type(entry: Option, kind: type) -> OptionType:
    if entry.choices:
        return click.Choice(entry.choices)
    if kind is int and entry.scale == 1:
        least, most = (None if bound is None else int(bound) for bound in (entry.least, entry.most))
        return Whole(least, most)
    if kind is float and entry.above == 0 and entry.below is None:
        return Positive()
    if kind is not str:
        low = _bound(entry.least if entry.above is None else entry.above, entry.scale)
        high = _bound(entry.most if entry.below is None else entry.below, entry.scale)
        return Real(
            low,
            high,
            min_open=entry.above is not None,
            max_open=entry.below is not None,
            limitless=entry.infinity_is_none,
        )
    return click.STRING


def _bound(bound: float | None, scale: float) -> float | None:
    """A setting's bound in the option's unit; whole where it can be, as the help shows it."""
    if bound is None:
        return None
    return int(bound * scale) if float(bound * scale).is_integer() else bound * scale


def _listed(text: str, kind: type) -> tuple[object, ...]:
    """The items of a text, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if kind is str:
        return tuple(parts)
    numbers = [whole_number(part) if kind is int else real_number(part) for part in parts if part]
    if None in numbers:
        what = "whole numbers" if kind is int else "finite numbers"
        raise PlanError(f"{text!r:.80} is not a list of {what} separated by commas")
    return tuple(numbers)


TRAINING_OPTIONS = options(*(setting_option(Settings, name) for name, _ in options_of(Settings)))
SEARCH_OPTIONS = options(
    *(setting_option(SearchSettings, name) for name, _ in options_of(SearchSettings) if name != "seed")
)
# Of the table, the short runs, and the compression run that the cost is compared with.
SEARCH_TRAINING_OPTIONS = options(
    setting_option(Settings, "max_length"),
    setting_option(
        Settings,
        "recipe",
        help="Recipe that the plan is for: that of the table, of the short runs and of the compression run that the "
        "cost is compared with.",
    ),
    setting_option(Settings, "epochs", help="Epochs of that compression run."),
    setting_option(Settings, "steps", help="Its optimizer steps; wins over --epochs. 0: nothing will be trained."),
    setting_option(Settings, "seed"),
    setting_option(Settings, "threads", help=None),
)


def more_text_of(files: tuple[str, ...], share: float | None) -> MoreText | None:
    """What --more-text and --more-text-share say together; wrong usage for a share of nothing."""
    from nxm_export.data.more_text import MoreText

    if not files and share is not None:
        raise click.UsageError("--more-text-share is the share of --more-text; name its file, or leave the share out")
    if not files:
        return None
    return MoreText(files) if share is None else MoreText(files, share)


def columns_of(text: str | None, pair: str | None, label: str | None, label_map: str | None = None) -> Columns:
    """The columns of a data file, as --text-column, --pair-column and --label-column name them, and what --label-map
    says of labels."""
    from nxm_export.data.columns import Columns

    return Columns(text, pair, label, _label_map(label_map or ""))


def _label_map(text: str) -> dict[str, str]:
    """Classes by label, of a text such as 0=bad,1=good."""
    entries = [entry.partition("=") for entry in text.split(",") if entry.strip()]
    made = {label.strip(): name.strip() for label, _, name in entries}
    if len(made) < len(entries) or not all(label and name for label, name in made.items()):
        raise click.BadParameter(
            f"{text!r} does not say once for each label which class it is; write it as in 0=bad,1=good",
            param_hint="--label-map",
        )
    return made


def shape_of(text: str) -> tuple[int, int]:
    """(batch, sequence) of a text such as 8x128."""
    batch, sequence = (size_of(part) for part in text.lower().partition("x")[::2])
    if batch is None or sequence is None:
        raise click.BadParameter(
            f"{text!r:.80} is not a shape; write batch x sequence, as in 8x128", param_hint="--shape"
        )
    return batch, sequence


def pattern_of(text: str) -> NMPattern:
    """The pattern that --pattern names."""
    try:
        return NMPattern.parse(text)
    except PlanError as error:
        raise click.BadParameter(str(error), param_hint="--pattern") from error


def numbers_of(text: str, option: str, what: str) -> tuple[int, ...]:
    """Whole numbers above 0, separated by commas; each once, as it was given first."""
    numbers = [size_of(part) for part in text.split(",")]
    if None in numbers:
        raise click.BadParameter(f"{text!r:.80} are no {what}; write them as in 8,16,32", param_hint=option)
    return tuple(dict.fromkeys(number for number in numbers if number is not None))
