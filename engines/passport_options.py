"""The options of a build that its passport keeps and that are read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.base import MOST_SHAPES, MOST_THREADS
from nxm_export.contract.choices import SparseUse
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import convert

_LARGEST = 2**20  # rows or tokens of a compiled shape
_WAY_OUT = "build the engine again"


@dataclass(frozen=True)
class KnownOptions:
    """The options that are read again, with their types; a backend may write more of its own."""

    threads: int | None = None
    shapes: tuple[tuple[int, int], ...] = ()
    shapes_bytes: int | None = None
    disabled_optimizers: tuple[str, ...] = ()
    sparse: SparseUse | bool | None = None
    fuse: bool | None = None
    level: int | None = None
    workspace_bytes: int | None = None
    build_route: str | None = None
    twin: str | None = None
    planned_products: int | None = None
    integer_products: int | None = None
    float_products: tuple[str, ...] = ()
    sparse_kernels: str | None = None


def require_options(given: Mapping[str, object], source: str) -> None:
    """Raise `ArtifactError` where an option has another type than it was written with, or a size that no engine has."""
    options = known_options(given, source)
    if options.threads is not None and not 1 <= options.threads <= MOST_THREADS:
        raise ArtifactError(f"{source}: options: threads is {options.threads}, and a machine has 1 or more; {_WAY_OUT}")
    if len(options.shapes) > MOST_SHAPES or any(
        not 1 <= size <= _LARGEST for shape in options.shapes for size in shape
    ):
        raise ArtifactError(
            f"{source}: options: {len(options.shapes)} shapes; an engine keeps {MOST_SHAPES} at most, of sizes from 1 "
            f"to {_LARGEST}; {_WAY_OUT}"
        )


def known_options(options: Mapping[str, object], source: str) -> KnownOptions:
    """The options that are read again; raises `ArtifactError` where one has another type than it was written with."""
    return convert(dict(options), KnownOptions, source=f"{source}: options", way_out=_WAY_OUT, foreign=True)
