"""The facts of one weight matrix that a sparse kernel depends on, as data: `nxm_export.graph.sparsity_scan` reads them
from a graph, `engines.sparsity.report` judges them. No heavy imports, so that an engine host without onnx can read a
report.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class MatrixFacts:
    """One weight matrix (K, N) of a graph.

    `pattern_float` and `pattern_int8` are the tightest well-known N:M along K of the floats and of the integers (None:
    dense, or not there); `sparse_along_k` says whether what the product reads is 2:4. `broken_groups` counts groups of
    four along K that keep more than two; `sparse_along_n` is True for a pattern on the wrong axis. `form` is matmul,
    gemm, conv1x1, conv or the operator's name; `output` the dtype that leaves the product with its bias and activation.
    """

    name: str
    node: str
    form: str
    k: int
    n: int
    planned: str | None
    planned_sparse: bool
    pattern_float: str | None
    pattern_int8: str | None
    sparse_along_k: bool
    sparse_along_n: bool
    broken_groups: int
    groups: int
    integer_weight: bool
    integer_input: bool
    scales_along_k: bool
    has_zero_point: bool
    output: str
    epilogue: str

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return asdict(self)
