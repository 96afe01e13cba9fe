"""What kernel names say, and which sparse kernels exist at all (the catalogue ``sparse_kernels.json``).

A kernel's name is the only proof of a sparse product. The rules are deliberately narrow: a name that they do not know
is unknown, and unknown never counts as sparse. Words are compared whole: ``convert`` is no ``conv``, and ``s884gemm``
(of floats) no ``s8``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal

from nxm_export.storage.json_files import read_record

CATALOGUE_FILE = Path(__file__).with_name("sparse_kernels.json")
CATALOGUE_SCHEMA = "nxm-sparse-kernels/1"
# Names as in the libraries of TensorRT 8.6 and RTX 1.7 and in inspector reports: sm80_xmma_sparse_gemm_i8i8_...,
# sm80_xmma_fprop_sparse_conv_..., sm80_xmma_fprop_avdt_sparse_int8int8_..., cutlass3x_sm100_sptensorop_...spgemm_s8_...
_KERNEL = re.compile(r"^(ampere_|hopper_|turing_|volta_|cutlass|cask|xmma|void |_Z|sm\d+_|.*_xmma_)", re.IGNORECASE)
_SPARSE = re.compile(r"(?<![a-z0-9])(?:sparse|sptensorop|(?:[a-z]?\d[\dx]*)?spgemm)(?![a-z0-9])", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|fprop|(?<![a-z])(?:conv|convolution|i?g?mma|mha)(?:\d?d)?(?![a-z])", re.IGNORECASE)
_INTEGER = re.compile(
    r"(?<![a-z0-9])(?:(?:i|s|u|int|uint)8)+(?:[isf]\d+)?(?![a-z0-9])|(?<![a-z])i(?:g?mma|\d+(?:sp)?gemm)(?![a-z])",
    re.IGNORECASE,
)
# A kernel's whole name as a profiler prints it: a library adds such as _execute_segment_k_off_kernel_trt.
_RAN = r"(?<!\w){}(?:(?:_execute(?:_\w+?)?)?_kernel\w*)?(?!\w)"


@dataclass(frozen=True)
class Kernel:
    """What the name of a product's kernel says. `sparse` and `integer` are False when the name does not say it."""

    name: str
    sparse: bool
    integer: bool


def kernel_named(name: str | None) -> Kernel | None:
    """The kernel of this name; None for no name, one of another kind, or a name whose rules we do not know."""
    if not name or name.startswith("__myl") or not _KERNEL.match(name) or not _PRODUCT.search(name):
        return None
    return Kernel(name, bool(_SPARSE.search(name)), bool(_INTEGER.search(name)))


def is_among(kernel: str, running: Iterable[str]) -> bool:
    """Whether `kernel` is the whole of one of the names `running`, as profilers print them: within brackets and other
    words, or with the ``_kernel`` of its library behind it. A part of a name is another kernel's. In names that were
    left mangled (``_Z...``) each identifier stands behind its length."""
    pattern = re.compile(_RAN.format(re.escape(kernel)))
    return bool(kernel) and any(
        pattern.search(text) for name in running for text in (name, *_identifiers(name, kernel))
    )


def _identifiers(name: str, kernel: str) -> Iterator[str]:
    """The identifiers of a mangled name that begin with `kernel`."""
    if name.startswith("_Z"):
        for match in re.finditer(rf"(?<!\d)([1-9]\d*)(?={re.escape(kernel)})", name):
            yield name[match.end() : match.end() + int(match[1])]


Kind = Literal["observed", "reported", "documented", "read", "inferred", "unknown"]
_KINDS: Mapping[Kind, str] = {
    "observed": "Observed",
    "reported": "Reported by others",
    "documented": "Documented",
    "read": "Read from a library",
    "inferred": "Inferred from names that a library does not have",
    "unknown": "Not known",
}


@dataclass(frozen=True)
class Existence:
    """Whether a sparse kernel exists (None: nobody has looked) and where that is known from, beginning with the kind of
    knowledge."""

    exists: bool | None
    source: str


@dataclass(frozen=True)
class CatalogueEntry:
    """Products, by patterns with ``*``, for which a sparse kernel exists, does not, or nobody has looked (None).

    `weights` is the type that is multiplied (``int8``, ``float16``, ``float`` for floats of an unknown type). `version`
    is the beginning of a TensorRT version, in whole parts: 10.1 is not 10.14. `epilogue` is the activation that the
    kernel computes on its way out, as `MatrixFacts` has it. `kind` is how the answer is known, and `source` a key of
    the sources.
    """

    backend: str | tuple[str, ...]
    version: str
    compute_capability: str | tuple[str, ...]
    weights: str | tuple[str, ...]
    form: str | tuple[str, ...]
    output: str | tuple[str, ...]
    exists: bool | None
    kind: Kind
    source: str
    epilogue: str = "*"


@dataclass(frozen=True)
class KernelCatalogue:
    """The file ``sparse_kernels.json``: of its `rows`, the first that fits answers."""

    about: str
    sources: Mapping[str, str]
    rows: tuple[CatalogueEntry, ...]


@cache
def _catalogue() -> KernelCatalogue:
    return read_record(
        CATALOGUE_FILE, KernelCatalogue, schema=CATALOGUE_SCHEMA, way_out="install nxm-export again: it is part of it"
    )


def sparse_kernel_exists(
    *,
    backend: str,
    version: str,
    compute_capability: str,
    weights: str,
    form: str,
    output: str,
    epilogue: str = "none",
) -> Existence:
    """The catalogue's answer for one product; a list of compute capabilities must agree, or the answer is None."""
    answers = [
        _lookup(backend, version, capability.strip(), weights, form, output, epilogue)
        for capability in compute_capability.split(",")
    ]
    sources = " ".join(dict.fromkeys(answer.source for answer in answers))
    kinds = {answer.exists for answer in answers}
    return Existence(kinds.pop() if len(kinds) == 1 else None, sources)


def _lookup(
    backend: str, version: str, capability: str, weights: str, form: str, output: str, epilogue: str
) -> Existence:
    for entry in _catalogue().rows:
        if (
            _fits(entry.backend, backend)
            and (entry.version == "*" or f"{version}.".startswith(f"{entry.version}."))
            and _fits(entry.compute_capability, capability)
            and _fits(entry.weights, weights)
            and _fits(entry.form, form)
            and _fits(entry.output, output)
            and _fits(entry.epilogue, epilogue)
        ):
            return Existence(entry.exists, f"{_KINDS[entry.kind]}: {_catalogue().sources[entry.source]}")
    return Existence(None, f"{_KINDS['unknown']}: no row is about such products")


def _fits(patterns: str | tuple[str, ...], value: str) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))
