"""A latency table from engines: what a matrix of every role takes under every option, by what was measured of their
products. A weight whose time cannot be told is an error that names it, never a guess."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nxm_export.contract.encoder_family import Family, Linear
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.records.latency_table import LatencySource, LatencyTable
from nxm_export.errors import EngineError, some
from nxm_export.storage.versions import installed_versions

if TYPE_CHECKING:
    from engines.passport import EnginePassport
    from engines.product_times import Form, ProductTime

ROUNDS = 20  # of engines that are timed now
BACKENDS = ("ort", "cusparselt")  # whose products have times of their own


def latency_table(
    engines: Sequence[str | Path],
    shape: tuple[int, int],
    candidates: Sequence[str],
    rounds: int | None = None,
    threads: int | None = None,
) -> LatencyTable:
    """The table of engine directories of one model and one backend at `shape` (batch, sequence), for the options
    `candidates`; those that no product was measured for are left out of it.

    Engines of ``ort`` are profiled now, over `rounds` runs on `threads` (by default those that they were built with).
    Those of ``cusparselt`` hold what was measured when they were built, and need no GPU. Raises `EngineError` for
    engines that do not belong together, and names a weight whose time cannot be told; `PlanError` for what is no
    option.
    """
    specs = {str(spec): spec for spec in map(WeightSpec.parse, candidates)}
    given = [Path(path) for path in engines]
    passports = _passports(given)
    family = _family(given)
    if passports[0].backend == "ort":
        threads = _threads(given, passports, threads)
        measured = _profiled(given, shape, rounds or ROUNDS, threads)
    elif rounds is not None or threads is not None:
        raise EngineError(
            "engines of cusparselt were timed when they were built; leave out the rounds and the number of threads"
        )
    else:
        from engines.cusparselt.product_times import product_times

        measured = [product_times(path, shape) for path in given]
    roles = _Roles(family)
    for path, products in zip(given, measured, strict=True):
        roles.add(path, products)
    milliseconds = {
        role: {option: means[form] for option, spec in specs.items() if (form := _form(spec, means)) in means}
        for role, means in roles.means().items()
    }
    empty = [role for role, options in milliseconds.items() if not options]
    if empty:
        raise EngineError(
            f"no product was measured for {', '.join(specs)} of {empty[0]}; add an engine that has them, or name other "
            "options by --candidates"
        )
    return LatencyTable(milliseconds, _source(passports, shape, threads, family, roles.sizes))


def _passports(engines: Sequence[Path]) -> list[EnginePassport]:
    """The passports of engines of one backend, device and set of versions."""
    from engines.passport import load_passport

    if len({path.resolve() for path in engines}) < len(engines):
        raise EngineError("the same engine is given twice")
    passports = [load_passport(path) for path in engines]
    for path, passport in zip(engines, passports, strict=True):
        if passport.backend not in BACKENDS:
            raise EngineError(
                f"{path}: products of {passport.backend} have no times of their own here; give engines of "
                f"{' or '.join(BACKENDS)}"
            )
        for what in ("backend", "requires"):
            ours, theirs = getattr(passports[0], what), getattr(passport, what)
            if ours != theirs:
                name = {"requires": "machine"}.get(what, what)
                raise EngineError(
                    f"{path}: its {name} is {theirs}, and that of {engines[0]} {ours}: no times of one table"
                )
    return passports


def _family(engines: Sequence[Path]) -> Family:
    types = {path: load_spec(path).model_type for path in engines}
    other = next((path for path in engines if types[path] != types[engines[0]]), None)
    if other is not None:
        raise EngineError(f"{other} is of {types[other]}, and {engines[0]} of {types[engines[0]]}: give one model's")
    if types[engines[0]] not in FAMILIES:
        raise EngineError(f"{engines[0]}: the roles of matrices of {types[engines[0]]} are not known here")
    return FAMILIES[types[engines[0]]]


def _threads(engines: Sequence[Path], passports: Sequence[EnginePassport], given: int | None) -> int:
    from engines.base import LoadOptions

    if given is None and len({passport.threads for passport in passports}) > 1:
        raise EngineError(f"{some(map(str, engines))} were built with different numbers of threads; give --threads")
    return LoadOptions(given).runs(passports[0].threads)[1]


def _profiled(
    engines: Sequence[Path], shape: tuple[int, int], rounds: int, threads: int
) -> list[tuple[ProductTime, ...]]:
    from engines.memory import require_room
    from engines.ort.product_times import product_times

    for path in engines:
        require_room(path, [shape], "timing it at", way_out="give a --shape of fewer rows or shorter texts")
    return product_times(engines, shape, rounds, threads)


def _form(spec: WeightSpec, means: Mapping[Form, float]) -> Form:
    """How a matrix of an option runs: 2:4 integers in a form of their own only where one was measured (not on CPUs)."""
    if spec.weight_bits is None:
        return "float"
    two_four = spec.pattern is not None and spec.pattern.implies_2_4
    return "int8 2:4" if two_four and "int8 2:4" in means else "int8"


@dataclass
class _Roles:
    """The times of products by form, role, and weight of each engine."""

    family: Family
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (out, in) of a matrix by role

    def __post_init__(self) -> None:
        self._blocks: set[str] = set()
        self._times: dict[str, dict[Form, list[float]]] = {role: defaultdict(list) for role in self.family.roles}

    def add(self, engine: Path, products: Sequence[ProductTime]) -> None:
        """Take in the products of an engine; raises `EngineError` that names a weight without a time, and for another
        model than that of the engines before."""
        found: dict[tuple[str, str, Form], dict[str | None, list[ProductTime]]] = defaultdict(lambda: defaultdict(list))
        for product in products:
            if (place := _place(self.family, product.weight)) is None:
                continue  # a head's, which no plan has
            block, linear, part = place
            if product.problem is not None or product.milliseconds is None:
                raise EngineError(f"{engine}: {product.weight} has no time: {product.problem}")
            found[block, linear.role, product.form][part].append(product)
        blocks = {block for block, _, _ in found}
        if not blocks or (self._blocks and blocks != self._blocks):
            raise EngineError(
                f"{engine}: its products are of {len(blocks)} blocks of {self.family.model_type}, and those of the "
                f"engines before of {len(self._blocks)}: give engines of one model"
            )
        self._blocks = blocks
        for block in sorted(blocks):
            for linear in self.family.linears:
                if not any(key[:2] == (block, linear.role) for key in found):
                    raise EngineError(
                        f"{engine}: {self.family.weight(block, linear)} has no time: no product that was measured has "
                        "it (cusparselt measures INT8 products alone)"
                    )
        for (block, role, form), parts in found.items():
            linear = next(each for each in self.family.linears if each.role == role)
            self._take(engine, self.family.weight(block, linear), linear, form, parts)

    def _take(
        self, engine: Path, weight: str, linear: Linear, form: Form, parts: Mapping[str | None, Sequence[ProductTime]]
    ) -> None:
        whole = {None}, {part.name for part in linear.parts}
        if set(parts) not in whole:
            raise EngineError(f"{engine}: {weight} has no time: its parts are not all {form} products of their own")
        products = [uses[0] for uses in parts.values()]
        size = sum(product.n for product in products), products[0].k
        if self.sizes.setdefault(linear.role, size) != size:
            raise EngineError(
                f"{engine}: {weight} is {size} (out, in), and others of its role are {self.sizes[linear.role]}: give "
                "engines of one model"
            )
        mean = sum(float(np.mean([use.milliseconds for use in uses])) for uses in parts.values())
        self._times[linear.role][form].append(mean)

    def means(self) -> dict[str, dict[Form, float]]:
        """Milliseconds of one use of a matrix by role and form, mean over blocks and engines."""
        return {
            role: {form: round(float(np.mean(times)), 6) for form, times in forms.items()}
            for role, forms in self._times.items()
        }


def _place(family: Family, weight: str) -> tuple[str, Linear, str | None] | None:
    """(block, linear layer, part) of a weight, or of a part of a fused one; None for one outside the blocks."""
    block = re.escape(f"{family.base}.{family.block}").replace(r"\{i\}", r"\d+").replace(r"\{group\}", r"\d+")
    for linear in family.linears:
        parts = "|".join(re.escape(part.name) for part in linear.parts)
        suffix = rf"(?:\.({parts}))?" if parts else "()"
        if found := re.fullmatch(rf"({block})\.{re.escape(linear.path)}{suffix}\.weight", weight):
            return found[1], linear, found[2] or None
    return None


def _source(
    passports: Sequence[EnginePassport],
    shape: tuple[int, int],
    threads: int | None,
    family: Family,
    sizes: Mapping[str, tuple[int, int]],
) -> LatencySource:
    from engines.devices import running_on

    first = passports[0]
    device = running_on(first) or "unknown"
    if first.backend == "ort":
        words, versions = f"per-node times of ONNX Runtime on the CPU {device}", installed_versions()
    elif first.device.get("kind") == "gpu":
        words, versions = f"measured products of the GPU {device}", dict(first.versions)
    else:
        words, versions = f"products of a stand-in, which are times of no GPU ({device})", dict(first.versions)
    return LatencySource(
        measured=words,
        backend=first.backend,
        device=device,
        threads=threads,
        batch=shape[0],
        sequence=shape[1],
        engines=tuple(passport.engine_sha256 for passport in passports),
        versions={**versions, **first.requires},  # of a GPU its own and its libraries'
        model_type=family.model_type,
        matrices=dict(sizes),
    )
