"""The products of a graph, and the facts of every weight matrix that a sparse kernel depends on, as data:
`nxm_export.graph.reading.sparsity_scan` reads them from a graph, `engines.sparsity.judgement` judges them. No heavy
imports, so that an engine host without onnx can read a report.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class MatrixFacts:
    """One weight matrix (K, N) of a graph.

    `pattern_float` and `pattern_int8` are the tightest well-known N:M along K of the floats and of the integers (None:
    dense, or not there); `sparse_along_k` says whether what the product reads is 2:4. `broken_groups` counts groups of
    four along K that keep more than two; `sparse_along_n` is True for a pattern on the wrong axis. `form` is matmul,
    gemm, conv1x1, conv, conv1d, conv3d or the operator's name; `output` the dtype that leaves the product with its
    bias and activation.

    `op` is the operator, `operand` which of its inputs the weight is (``input 1``). `stored` is the type in the file,
    `codes` the type that is multiplied: what a DequantizeLinear or an integer operator reads (``INT8`` for INT4 that is
    cast first), otherwise that of the operand (``FLOAT`` for integers that the graph scales by itself); None in records
    of older versions. `moved_by` are operators between DequantizeLinear and product that a weight usually has not
    there, such as Split. `run` is how many elements of K lie together: the channels of one group of a convolution; no
    group of four crosses its end. `groups_of_channels` is the convolution's. `scales_in_blocks` says that one output
    channel has several scales along K. `scale_problems` is what is wrong with the scales themselves. `stack` is how
    many matrices lie side by side in N, each for a part of the input. `broken_groups_of_codes` is `broken_groups` as it
    would be if every zero point were 0; None in records of older versions."""

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
    op: str = ""
    operand: str = ""
    stored: str = ""
    codes: str | None = None
    run: int = 0
    groups_of_channels: int = 1
    scales_in_blocks: bool = False
    scale_problems: tuple[str, ...] = ()
    moved_by: tuple[str, ...] = ()
    stack: int = 1
    broken_groups_of_codes: int | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class UnreadProduct:
    """A product with an operand that no input of the graph decides, and that was not read: `reason` says why.

    `name` is the constant or value (empty for constants among the node's attributes), `node` the product's node, `op`
    its operator, `operand` which input it is.
    """

    name: str
    node: str
    op: str
    operand: str
    reason: str

    def __str__(self) -> str:
        weight = self.name or "of its own"
        return f"{self.node} ({self.op}): its weight {weight} ({self.operand}) was not read: {self.reason}"


@dataclass(frozen=True)
class ScannedProducts:
    """Every product of a graph that multiplies by a constant: those that were read, in graph order, and the others."""

    facts: tuple[MatrixFacts, ...]
    unread: tuple[UnreadProduct, ...]


@dataclass(frozen=True)
class ProductCounts:
    """How many products multiply by a constant, of how many it was read, and of how many of these it is 2:4 along K."""

    found: int
    read: int
    sparse: int

    def __str__(self) -> str:
        return f"{self.found} products, {self.read} read, {self.sparse} sparse"
