"""What kernel names say, and which sparse kernels exist at all (the reason table, ``sparse_kernels.json``).

A kernel's name is the only proof of a sparse product. The rules are deliberately narrow: a name that they do not know is
unknown, and unknown never counts as sparse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("sparse_kernels.json")
# Names as in the libraries of TensorRT 8.6 and RTX 1.7 and in inspector reports: sm80_xmma_sparse_gemm_i8i8_...,
# sm80_xmma_fprop_sparse_conv_..., sm80_xmma_fprop_avdt_sparse_int8int8_..., cutlass3x_sm100_sptensorop_...spgemm_s8_...
_KERNEL = re.compile(r"^(ampere_|hopper_|turing_|volta_|cutlass|cask|xmma|void |_Z|sm\d+_|.*_xmma_)", re.IGNORECASE)
_SPARSE = re.compile(r"(?:^|[_\W])sparse(?:[_\W]|$)|spgemm|sptensorop", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|conv|fprop|imma|gmma|mha", re.IGNORECASE)
_INTEGER = re.compile(r"(?<![a-z0-9])(?:i8|int8|s8)|imma|igmma", re.IGNORECASE)
_STUBS = ("__myelin_CASK_STUB",)


@dataclass(frozen=True)
class Kernel:
    """What a kernel's name says. Each of `product`, `sparse` and `integer` is False when the name does not say it."""

    name: str
    product: bool
    sparse: bool
    integer: bool


def kernel_named(name: str | None) -> Kernel | None:
    """The kernel of this name; None for no name, a stand-in, or a name whose rules we do not know."""
    if not name or name in _STUBS or name.startswith("__myl") or not _KERNEL.match(name) or not _PRODUCT.search(name):
        return None
    return Kernel(name, True, bool(_SPARSE.search(name)), bool(_INTEGER.search(name)))


@dataclass(frozen=True)
class Existence:
    """Whether a sparse kernel exists (None: nobody has looked) and where that is known from."""

    exists: bool | None
    source: str


@cache
def _table() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return data


def sparse_kernel_exists(
    *, backend: str, version: str, compute_capability: str, integer: bool, form: str, output: str
) -> Existence:
    """The reason table's answer for one product; a list of compute capabilities must agree, or the answer is None."""
    answers = [
        _lookup(backend, version, capability.strip(), "int8" if integer else "float", form, output)
        for capability in compute_capability.split(",")
    ]
    sources = " ".join(dict.fromkeys(answer.source for answer in answers))
    kinds = {answer.exists for answer in answers}
    return Existence(kinds.pop() if len(kinds) == 1 else None, sources)


def _lookup(backend: str, version: str, capability: str, weights: str, form: str, output: str) -> Existence:
    for row in _table()["rows"]:
        if (
            _fits(row["backend"], backend)
            and (row["version"] == "*" or f"{version}.".startswith(f"{row['version']}."))
            and _fits(row["compute_capability"], capability)
            and _fits(row["weights"], weights)
            and _fits(row["form"], form)
            and _fits(row["output"], output)
        ):
            return Existence(row["exists"], _table()["sources"][row["source"]])
    return Existence(None, "no row of the table fits")


def _fits(wanted: str | Sequence[str], value: str) -> bool:
    return any(fnmatchcase(value, item) for item in ([wanted] if isinstance(wanted, str) else wanted))
