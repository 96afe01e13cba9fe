"""What `run`, `estimate` and `compress` are asked for, as one request: pattern and bits, a plan, or a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.choices import PATTERN, STORAGE, WEIGHT_BITS
from nxm_export.contract.plan import CompressionPlan, NMPattern, WeightSpec
from nxm_export.data.columns import Columns
from nxm_export.data.more_text import MoreText
from nxm_export.errors import PlanError

if TYPE_CHECKING:
    from compressors.search.settings import SearchSettings
    from compressors.settings import Settings
    from nxm_export.pipeline.plan_choice import PlanChoice
    from nxm_export.pipeline.request import Request


@dataclass(frozen=True)
class PlanOptions:
    """What a uniform plan has beside pattern and bits.

    `placement` says where activation quantizers stand (None: ``inputs-outputs``, where weights are quantized),
    `residual` and `embedding` whether the residual connections and the word-embedding table are ``float`` or ``int8``,
    `keep_dense` are globs of weights to leave alone (docs/concepts.md). Raises `PlanError` for one glob that is not
    in a tuple.
    """

    placement: str | None = None
    residual: str = STORAGE
    embedding: str = STORAGE
    keep_dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.keep_dense, str):
            raise PlanError(f"keep_dense takes several globs; write ({self.keep_dense!r},)")


class Default(Enum):
    """`DEFAULT` stands for an argument that was not given, where None has a meaning of its own."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return self.name


DEFAULT = Default.DEFAULT


def pattern_of(pattern: str | NMPattern | None) -> NMPattern | None:
    """A pattern, or the one that a text names; raises `PlanError` for a text that names none."""
    return NMPattern.parse(pattern) if isinstance(pattern, str) else pattern


def _spec(pattern: str | NMPattern | None, weight_bits: int | None) -> WeightSpec:
    spec = WeightSpec(pattern_of(pattern), weight_bits, None if weight_bits is None else 8)
    if spec.is_dense:
        raise PlanError("pattern None and weight_bits None leave nothing to compress; give one of them")
    return spec


@dataclass(frozen=True)
class PlanArguments:
    """What `run`, `estimate` and `compress` were told about the plan, as they got it."""

    pattern: str | NMPattern | Default | None
    weight_bits: int | Default | None
    plan: CompressionPlan | str | Path | None
    search: float | SearchSettings | None
    options: PlanOptions

    def require_one(self) -> None:
        """Raise `PlanError` where two of these say what a weight gets: one would win silently."""
        from nxm_export.pipeline.plan_choice import require_plan_alone

        uniform = {"pattern": self.pattern, "weight_bits": self.weight_bits}
        given = [name for name, value in uniform.items() if not isinstance(value, Default)]
        if self.search is not None:
            require_plan_alone(self.search, [*(["plan"] if self.plan is not None else []), *given])
            # A search takes places and table as they are asked for, where its settings do not say them.
            whole = not _is_share(self.search) and self.options != PlanOptions()
            partly = self.options.residual != STORAGE or bool(self.options.keep_dense)
            require_plan_alone(self.search, ["options"] if whole or partly else [])
        require_plan_alone(self.plan, [*given, *(["options"] if self.options != PlanOptions() else [])])

    def spec(self) -> WeightSpec:
        """What every weight gets where neither plan nor search says it; then nothing reads it."""
        if self.plan is not None:
            return WeightSpec()
        return _spec(
            PATTERN if isinstance(self.pattern, Default) else self.pattern,
            WEIGHT_BITS if isinstance(self.weight_bits, Default) else self.weight_bits,
        )


def planned(
    arguments: PlanArguments,
    model: str | Path,
    train: str | Path,
    dev: str | Path | None,
    task: str,
    settings: Settings | None,
    columns: Columns,
) -> tuple[Request, PlanChoice]:
    """The request, and where its plan comes from."""
    from compressors.settings import Settings
    from nxm_export.pipeline.plan_choice import PlanChoice
    from nxm_export.pipeline.request import Request

    arguments.require_one()
    options = arguments.options
    request = Request(
        model=str(model),
        task=task,
        train=str(train),
        dev=None if dev is None else str(dev),
        spec=arguments.spec(),
        settings=settings or Settings(),
        columns=columns,
        placement=options.placement,
        residual=options.residual,
        embedding=options.embedding,
        keep_dense=options.keep_dense,
    )
    choice = PlanChoice(arguments.plan, _search_of(request, arguments.search))
    return replace(request, planned=choice.given), choice


def _is_share(search: float | SearchSettings | None) -> bool:
    return isinstance(search, (int, float)) and not isinstance(search, bool)


def _search_of(request: Request, search: float | SearchSettings | None) -> SearchSettings | None:
    """The settings of a search: those that were given, or of a share of bits that it saves.

    Raises `PlanError` for anything else: it would be found out after fine-tuning alone."""
    from compressors.search.settings import SearchSettings
    from nxm_export.pipeline.plan_choice import search_for

    if search is None or isinstance(search, SearchSettings):
        return search
    if not _is_share(search):
        raise PlanError(
            f"search is the share of bits that a plan saves, such as 0.875, or a SearchSettings; got {search!r}"
        )
    return search_for(request, search)


def names_of(backend: str | Sequence[str]) -> tuple[str, ...]:
    """The names of one backend or of several."""
    return (backend,) if isinstance(backend, str) else tuple(backend)


def with_data(request: Request, revision: str | None, train_limit: int | None, more_text: MoreText | None) -> Request:
    """The request with the model's revision, and with how much of `train` and what else is trained on."""
    return replace(request, revision=revision, train_limit=train_limit, more_text=more_text)
