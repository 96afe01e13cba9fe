"""``verify.json``: what `nxm verify` says about an ONNX file. No heavy imports, so that a host without onnx can read
it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nxm_export.contract.plan import NMPattern
from nxm_export.contract.records.matrix_facts import ProductCounts, UnreadProduct
from nxm_export.errors import ArtifactError, ExportError
from nxm_export.storage.json_files import convert, read_json, require_schema, to_json_object

SCHEMA = "nxm-verify/1"
VERIFY_FILE = "verify.json"


@dataclass(frozen=True)
class WeightReport:
    """One weight matrix. `pattern` is the tightest well-known N:M that the stored values follow along K, `zeros` the
    share of weights that are zero. `nodes` are the products that read it alike. `sparse` says whether a sparse kernel
    can read it as 2:4: 1:2 of a K that is no multiple of 4 is not; None in reports of older versions."""

    name: str
    op: str
    k: int
    n: int
    stored: str
    scale_axis: str | None
    zeros: float
    pattern: str | None
    planned: str | None
    problems: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    sparse: bool | None = None

    @property
    def is_sparse(self) -> bool:
        """True when it is 2:4 along K, or tighter."""
        if self.sparse is not None:
            return self.sparse
        return self.pattern is not None and NMPattern.parse(self.pattern).implies_2_4


@dataclass(frozen=True)
class VerifyReport:
    """All weights and the problems of the graph as a whole. `embedding` is the size (tokens, features) of a
    word-embedding table that is stored in INT8. `unread` are the products whose weight was not read. `hashes` are the
    sha256 of the file and of those beside it that hold its weights, by name; None in reports of older versions."""

    file: str
    weights: tuple[WeightReport, ...]
    problems: tuple[str, ...] = ()
    quantize_nodes: int = 0
    dequantize_nodes: int = 0
    embedding: tuple[int, int] | None = None
    unread: tuple[UnreadProduct, ...] = ()
    hashes: Mapping[str, str] | None = None

    @property
    def passed(self) -> bool:
        """True when nothing is wrong."""
        return not self.all_problems

    @property
    def all_problems(self) -> list[str]:
        """The problems of every weight, with its name, then those of the whole graph."""
        labelled = zip(self.labels, self.weights, strict=True)
        return [*(f"{label}: {problem}" for label, weight in labelled for problem in weight.problems), *self.problems]

    @property
    def labels(self) -> list[str]:
        """Every weight's name, with the products that read it where the name alone could mean another one."""
        count = Counter(weight.name for weight in self.weights)
        return [
            f"{weight.name} ({', '.join(weight.nodes)})" if count[weight.name] > 1 and weight.nodes else weight.name
            for weight in self.weights
        ]

    @property
    def products(self) -> ProductCounts:
        """How many products there are, were read, and are sparse."""
        read = sum(max(len(weight.nodes), 1) for weight in self.weights)
        sparse = sum(max(len(weight.nodes), 1) for weight in self.weights if weight.is_sparse)
        return ProductCounts(read + len(self.unread), read, sparse)

    def require(self) -> None:
        """Raise `ExportError` naming the first problem, unless `passed`."""
        if not self.passed:
            first, *others = self.all_problems
            more = f" (and {len(others)} more problems)" if others else ""
            raise ExportError(f"{self.file}: {first}{more}")

    def to_dict(self) -> dict[str, object]:
        """The form of ``verify.json`` and ``--json``."""
        products = to_json_object(self.products)
        return {"schema": SCHEMA, "passed": self.passed, "products": products, **to_json_object(self)}


def read_verify_report(file: Path) -> VerifyReport:
    """Read a ``verify.json``; raises `ArtifactError`, also when it says ``passed`` and lists problems, or the
    reverse."""
    way_out = "export again"
    fields = require_schema(read_json(file, way_out), SCHEMA, str(file), ArtifactError)
    passed = fields.pop("passed", None)
    fields.pop("products", None)  # counts of what the report lists
    report = convert(fields, VerifyReport, source=str(file), way_out=way_out)
    if passed is not report.passed:
        raise ArtifactError(f"{file}: passed is {passed}, and it lists {len(report.all_problems)} problems; {way_out}")
    return report
