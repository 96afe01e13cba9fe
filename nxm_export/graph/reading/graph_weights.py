"""The weight matrices of any ONNX graph, whoever made it: what is stored, along which axis it is reduced, how it is
scaled.

Every product one of whose operands depends on no input of the graph is found (`nxm_export.graph.reading.products`), and
the operand is computed as the operators compute it (`nxm_export.graph.reading.constant_values`): whatever stands
between the stored constants and the product, the matrix is what the product reads. Where a DequantizeLinear scales it,
the matrix is the integers in front of that, moved as the scaled values are moved. What cannot be read says why, and is
never left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nxm_export.contract.plan import NMPattern
from nxm_export.contract.records.matrix_facts import UnreadProduct
from nxm_export.errors import ArtifactError, NxmError
from nxm_export.graph.reading.constant_values import ConstantValues, NotComputed, plain, stored_array
from nxm_export.graph.reading.dependence import Dependence, dependences
from nxm_export.graph.reading.node_checks import malformed_nodes
from nxm_export.graph.reading.products import NotRead, Operand, name_of, operands
from nxm_export.graph.reading.sparse_tensors import densify
from nxm_export.graph.reading.weight_codes import Codes, Origins, dequantized, origins_of, scaled_by_operator, type_name
from nxm_export.storage.hashing import file_hash

_DETECTED = (NMPattern(1, 4), NMPattern(2, 8), NMPattern(1, 2), NMPattern(2, 4), NMPattern(4, 8))
PROTOBUF_LIMIT = 1_800_000_000  # bytes; protobuf itself ends at 2 GB
_SPARSE_TENSORS, _HASH = "nxm.sparse_tensors", "nxm.sha256"  # in a model's `meta`, which no file has
_LONGEST_BIAS = 16384  # the widest FFN that encoders have; a packed matrix of 256 by 256 codes of 4 bits is longer


@dataclass(frozen=True)
class GraphWeight:
    """One weight matrix as a product node reads it.

    `matrix` is (K, N): the integers that a DequantizeLinear or the operator itself scales, otherwise the values.
    `operand` is the input of `node` that it is; `stored` the type in the file and `codes` the type of the matrix:
    of what DequantizeLinear reads, where there is one. `scale_axis` is ``N``, ``K``, ``block`` (several scales
    along K), ``tensor`` or ``nothing`` (they fit no axis), None without scale; `zero_point` has a shape that
    `matrix` broadcasts with, or another that nothing here knows. `quantized` says that stored integers or a
    QuantizeLinear made it, in whatever way. K consists of runs of `run` elements that lie together. `stack` is how
    many matrices the operand has (of a convolution it says nothing), `axes` how many axes. `unrounded` is the matrix in
    front of a QuantizeLinear of constants, and `moved_by` names operators that take a part of it or join it, behind its
    DequantizeLinear."""

    name: str
    node: ir.Node
    matrix: np.ndarray
    stored: str
    scale: np.ndarray | None
    scale_axis: str | None
    zero_point: np.ndarray | None
    operand: str
    codes: str
    quantized: bool
    run: int
    stack: int = 1
    axes: int = 2
    unrounded: np.ndarray | None = None
    moved_by: tuple[str, ...] = ()

    @property
    def k(self) -> int:
        """Reduced size."""
        return int(self.matrix.shape[0])

    @property
    def n(self) -> int:
        """Output channels."""
        return int(self.matrix.shape[1])

    @property
    def is_quantized(self) -> bool:
        """True when the product reads integers: its operand is an integer tensor, or dequantized from one."""
        return self.matrix.dtype.kind in "iu"

    def before_rounding(self) -> GraphWeight:
        """The weight as it was in front of a QuantizeLinear in the file; itself when the file stores the integers."""
        if self.unrounded is None:
            return self
        return replace(self, matrix=self.unrounded, zero_point=None, codes="FLOAT", unrounded=None)

    def without_zero_points(self) -> GraphWeight:
        """The same codes with every zero point at 0; itself where they are."""
        return replace(self, zero_point=None) if self.has_zero_point else self

    @property
    def has_zero_point(self) -> bool:
        """True when a zero point is not 0, of one channel or block alone, too."""
        return self.zero_point is not None and bool(np.any(self.zero_point))

    def nonzero_mask(self) -> npt.NDArray[np.bool_]:
        """Boolean (K, N): which weights are not zero (not the zero point, for an asymmetric weight)."""
        return self._nonzero_mask

    @cached_property
    def _nonzero_mask(self) -> npt.NDArray[np.bool_]:
        zero = self.zero_point
        if zero is None or not self.is_quantized or not self.has_zero_point:
            return np.asarray(self.matrix != np.zeros((), self.matrix.dtype), bool)
        try:
            np.broadcast_to(zero, self.matrix.shape)
        except ValueError:  # zero points in no known layout: nothing can be called zero
            return np.ones(self.matrix.shape, bool)
        return np.asarray(self.matrix != zero, bool)

    def follows(self, pattern: NMPattern) -> bool:
        """True when every M consecutive weights along K, in every output channel, keep at most N; an empty matrix
        follows nothing."""
        return bool(self.matrix.size) and self.run % pattern.m == 0 and self.violations(pattern) == 0

    def groups(self, pattern: NMPattern) -> int:
        """Number of groups of M along K; a tail of a run that is shorter than M counts as one."""
        return self.k // self.run * -(-self.run // pattern.m) * self.n if self.run else 0

    @cached_property
    def density(self) -> float:
        """Share of weights that are not zero; 0 of an empty matrix."""
        return np.count_nonzero(self._nonzero_mask) / max(self.matrix.size, 1)

    def violations(self, pattern: NMPattern) -> int:
        """Number of `groups` along K that keep more than N of M."""
        if pattern not in self._violations:  # counting is most of the work on a large file
            self._violations[pattern] = self._broken_groups(pattern) if self.matrix.size else 0
        return self._violations[pattern]

    @cached_property
    def _violations(self) -> dict[NMPattern, int]:
        return {}

    def _broken_groups(self, pattern: NMPattern) -> int:
        mask = self.nonzero_mask().reshape(self.k // self.run, self.run, self.n)
        tail = -self.run % pattern.m
        if tail:
            mask = np.concatenate([mask, np.zeros((len(mask), tail, self.n), bool)], axis=1)
        kept = np.min_scalar_type(pattern.m)  # the smallest type that holds a count: the larger, the slower
        return int((mask.reshape(-1, pattern.m, self.n).sum(axis=1, dtype=kept) > pattern.n).sum())

    def pattern(self) -> NMPattern | None:
        """The tightest well-known pattern that the weight follows along K, or None when it is dense."""
        if not self.matrix.size or self.density > 0.5:
            return None
        return next((pattern for pattern in _DETECTED if self.follows(pattern)), None)


def parameter_of(name: str) -> str:
    """The checkpoint's parameter that a constant of one of our graphs holds; other names are left as they are."""
    for suffix in ("_quantized", "_dense", "_image"):
        name = name.removesuffix(suffix)
    return name


def load_graph(file: str | Path) -> ir.Model:
    """Read an ONNX file, its local functions inlined and its sparse tensors made dense (`sparse_tensors` names them);
    raises `ArtifactError` when it is missing, truncated or not ONNX, or has nodes that nothing can run."""
    import onnx_ir.passes.common as passes

    file = Path(file)
    if not file.is_file():
        inside = f"; give {file / 'model.onnx'}" if (file / "model.onnx").is_file() else ""
        what = f"a directory, not an ONNX file{inside}" if file.is_dir() else "no such file"
        raise ArtifactError(f"{file}: {what}")
    try:
        model = _loaded(file)
        if not len(model.graph) or not model.opset_imports:
            raise ValueError("no nodes, or no opset")
        if model.functions:
            passes.InlinePass()(model)
    except Exception as error:  # protobuf, external data and IR errors come as many types
        raise ArtifactError(
            f"{file}: not a readable ONNX model ({_first_line(error)}); it is truncated, or another format"
        ) from error
    malformed = next(malformed_nodes(model), None)
    if malformed is not None:
        raise ArtifactError(f"{file}: {malformed}: no runtime can run that; export it again")
    return model


def _loaded(file: Path) -> ir.Model:
    """As onnx_ir loads a file, but for sparse tensors, which it does not know."""
    import onnx

    before = file_hash(file)
    proto = onnx.load(file, load_external_data=False)
    sparse = densify(proto)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, file.parent)
    model.meta[_SPARSE_TENSORS], model.meta[_HASH] = tuple(sparse), before
    return model


def hash_before_reading(model: ir.Model) -> str | None:
    """sha256 of the file of a model that `load_graph` read, as it was before; None for another model. A file that has
    it still is the one that was read."""
    value = model.meta.get(_HASH)
    return value if isinstance(value, str) else None


def sparse_tensors(model: ir.Model) -> tuple[str, ...]:
    """The constants that the file of a model that `load_graph` read keeps as sparse tensors."""
    names = model.meta.get(_SPARSE_TENSORS, ())
    assert isinstance(names, tuple)
    return names


def save_graph(model: ir.Model, file: Path) -> None:
    """Write one ONNX file where protobuf allows it (2 GB), else weights next to it in ``<file>.data``."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > PROTOBUF_LIMIT:
        ir.save(model, file, external_data=f"{file.name}.data")
        return
    ir.external_data.load_to_model(model)  # weights of a .data file come into this one
    ir.save(model, file)


def graph_weights(model: ir.Model) -> Iterator[GraphWeight]:
    """Every weight of a product that can be read, in graph order; see `graph_products`."""
    return (found for found in graph_products(model) if isinstance(found, GraphWeight))


def graph_products(model: ir.Model) -> Iterator[GraphWeight | UnreadProduct]:
    """Every operand of a product that depends on no input of the graph, in graph order: read, or why it was not.

    What a product makes of constants alone is a constant itself, and no product of the running model. An operand that
    depends on the shape of an input, though not on its data, is never read, and is there.
    """
    reader = _Reader(model)
    for node in model.graph.all_nodes():
        for operand in operands(node):
            found = reader.read(operand)
            if found is not None:
                yield found


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The values of a constant, or None for anything else; 4-bit integers come as 8-bit ones, 8- and 16-bit floats as
    float32.

    Raises `ArtifactError` when the constant's data are missing or damaged.
    """
    array = None if value is None else stored_array(value)
    return None if array is None else plain(array)


class _Reader:
    """Reads operands of products of one model."""

    def __init__(self, model: ir.Model) -> None:
        self.constants = ConstantValues(model)
        self._overridden = dependences(model, with_defaults=True)

    def read(self, operand: Operand) -> GraphWeight | UnreadProduct | None:
        """The weight, or why it was not read; None when the operand is no constant."""
        node, value = operand.node, operand.value
        if value is None:
            origins = Origins((), quantized=False)
        else:
            if not self._runs(node, value):
                return None
            origins = origins_of(value)
        try:
            return self._weight(operand, value, origins)
        except NxmError:
            raise
        except (NotRead, NotComputed) as why:
            reason = str(why)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            reason = f"it, or what makes it, is malformed ({_first_line(error)})"
        name = origins.name or (value is not None and value.name) or ""
        return UnreadProduct(name, name_of(node), node.op_type, operand.label, reason)

    def _runs(self, node: ir.Node, value: ir.Value) -> bool:
        """True when an operand depends on less than its product does, so that it is a constant of the running model.

        Where all depends on constants alone, an input that has a value in the file may still be overridden: the product
        runs, and its weights are the operands that no input overrides, or else all.
        """
        runs = max((self.constants.dependence(output) for output in node.outputs), default=Dependence.NOTHING)
        if runs is not Dependence.NOTHING:
            return self.constants.dependence(value) < runs
        if not any(id(output) in self._overridden for output in node.outputs):
            return False
        multiplied = [other.value for other in operands(node) if other.value is not None]
        return id(value) not in self._overridden or all(id(other) in self._overridden for other in multiplied)

    def _weight(self, operand: Operand, value: ir.Value | None, origins: Origins) -> GraphWeight | None:
        if value is None:
            operand.matrix(np.zeros(0))
            return None
        if self.constants.dependence(value) is not Dependence.NOTHING:
            raise NotRead("an input of the graph decides its shape or its scale, or which branch of an If gives it")
        if operand.product.is_unknown and self._is_vector(value):
            return None  # a matrix may be a weight of an operator of which nothing is known; a vector is none
        codes = scaled_by_operator(operand, self.constants)
        if codes is None and not operand.product.reads_codes:
            codes = dequantized(value, self.constants)
        values = self.constants.array(value) if codes is None else codes.codes
        read = operand.matrix(plain(values))
        scale, axis = (None, None) if codes is None else _scales(codes, operand)
        floats = None if codes is None or codes.floats is None else operand.matrix(codes.floats).array
        return GraphWeight(
            name=origins.name or value.name or "",
            node=operand.node,
            matrix=read.array,
            stored=origins.stored or str(value.dtype),
            scale=scale,
            scale_axis=axis,
            zero_point=None if codes is None else _zeros(codes, operand, read.array.shape),
            operand=operand.label,
            codes=type_name(values) if codes is None else codes.kind,
            quantized=codes is not None or origins.quantized,
            run=read.run,
            stack=math.prod(values.shape[:-2]),
            axes=values.ndim,
            unrounded=floats,
            moved_by=() if codes is None else codes.moved_by,
        )

    def _is_vector(self, value: ir.Value) -> bool:
        """True for a constant of one axis or none that is no longer than a bias is; a longer one may be a matrix that
        an operator packs in its own way."""
        shape = value.shape
        if shape is None or not all(isinstance(size, int) for size in shape):
            array = self.constants.array(value)
            return array.ndim < 2 and array.size <= _LONGEST_BIAS
        return len(shape) < 2 and all(int(str(size)) <= _LONGEST_BIAS for size in shape)


def _scales(codes: Codes, operand: Operand) -> tuple[np.ndarray | None, str | None]:
    """The scales and their axis; one per output channel in the order of the matrix's columns."""
    scale = codes.scale
    if scale is None:
        return None, None
    if scale.values.size == 1:
        return scale.values, "tensor"
    if codes.blocked:
        return scale.values, "block"
    if scale.index is None and not operand.product.reads_codes:
        return scale.values, "nothing"
    if scale.index is None:  # an operator's own
        return scale.values, "N"
    index = operand.matrix(scale.index).array
    if not index.size:
        return scale.values, "N"
    if (index == index[:1]).all():
        return scale.values[index[0]], "N"
    if (index == index[:, :1]).all():
        return scale.values[index[:, 0]], "K"
    return scale.values, "block"


def _zeros(codes: Codes, operand: Operand, shape: tuple[int, ...]) -> np.ndarray | None:
    """The zero points, in a shape that the matrix broadcasts with, unless they fit none of its axes."""
    zero = codes.zero
    if zero is None:
        return None
    if zero.values.size == 1 or not np.any(zero.values):  # all alike
        return zero.values[:1]
    if zero.index is not None:
        return np.asarray(zero.values[operand.matrix(zero.index).array])
    if operand.product.reads_codes and zero.values.size == shape[1]:
        return zero.values.reshape(1, -1)
    return zero.values.reshape(-1, 1, 1, 1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
