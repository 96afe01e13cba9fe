"""What TensorRT's ONNX parser refuses, and what it takes and computes otherwise, read from a graph without TensorRT.

A rule holds for versions, and names where that is known from: the sources of onnx-tensorrt for 8.6 and 10.1, the parser
of TensorRT-RTX 1.7.1 (of the generation of TensorRT 11) where it was asked. What `nxm verify` checks (scales, zero
points, pairs) is not checked again here. A file that keeps all rules may still be refused: a parser has more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx_ir as ir

from nxm_export.errors import ExportError
from nxm_export.graph.quantized_values import codes_type, quantizer_behind, values_behind
from nxm_export.graph.reading.graph_weights import array_of
from nxm_export.storage.json_files import read_record

OPERATORS_FILE = Path(__file__).with_name("tensorrt_operators.json")
OPERATORS_SCHEMA = "nxm-tensorrt-operators/1"
_SOURCES = {
    "8.6": "source of onnx-tensorrt release/8.6-GA",
    "10.1": "source of onnx-tensorrt release/10.1-GA",
    "1.7": "asked of TensorRT-RTX 1.7.1",
}
_TYPES_8_6 = frozenset({"FLOAT", "FLOAT16", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "BOOL"})
_TYPES_10_1 = _TYPES_8_6 | {"BFLOAT16", "INT4", "FLOAT8E4M3FN"}
# What a tensor of a graph may hold; UINT8 only at its ends.
_TYPES = {"8.6": _TYPES_8_6, "10.1": _TYPES_10_1, "1.7": _TYPES_10_1 | {"FLOAT4E2M1"}}
_CODES = {
    "8.6": frozenset({"INT8"}),
    "10.1": frozenset({"INT8", "INT4", "FLOAT8E4M3FN"}),
    "1.7": frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}),
}
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_OWN_DOMAINS = ("", "ai.onnx")
_SAME_BY_NAME = ("com.microsoft",)  # TensorRT looks at no domain; these operators it imports as that domain means them
_NOT_THE_SAME = ("Attention",)  # ... but this one, which it reads as ONNX's


@dataclass(frozen=True)
class OperatorTable:
    """The operators that one parser imports."""

    backend: str
    version: str
    source: str
    operators: frozenset[str]


@dataclass(frozen=True)
class OperatorTables:
    """The file ``tensorrt_operators.json``."""

    about: str
    tables: tuple[OperatorTable, ...]


@dataclass(frozen=True)
class ParserProblem:
    """One node or tensor that the parser refuses, or takes and computes otherwise (`misread`); `rule` is a short name
    and `source` where the rule is known from."""

    rule: str
    where: str
    text: str
    source: str
    misread: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.text} ({self.source})"


@dataclass(frozen=True)
class Parser:
    """The parser that a backend's version has, as far as one was looked at: `known` is a key of the tables above, and
    it imports the operators of all `tables`."""

    name: str
    known: str
    tables: tuple[str, ...]

    @property
    def source(self) -> str:
        """Where its rules are known from."""
        return _SOURCES[self.known]

    def takes(self, operator: str) -> bool:
        """Whether it imports an operator of this name."""
        return any(operator in table.operators for table in _tables().tables if table.version in self.tables)


def parser_of(backend: str, version: str) -> Parser:
    """The parser of a backend's version (``8.6``, ``10`` for 10.0, ``11.4.0.1``): the eldest that was looked at and is
    not older, because parsers learn and do not forget."""
    if backend == "trt_rtx":
        return Parser(f"TensorRT-RTX {version}", "1.7", ("1.7",))
    numbers = tuple(int(part) for part in version.split("."))[:2]
    if numbers <= (8, 6):
        return Parser(f"TensorRT {version}", "8.6", ("8.6",))
    if numbers <= (10, 1):
        return Parser(f"TensorRT {version}", "10.1", ("10.1",))
    return Parser(f"TensorRT {version}", "1.7", ("10.1", "1.7"))


def parser_problems(model: ir.Model, parser: Parser) -> list[ParserProblem]:
    """Everything in a graph, its subgraphs included, that `parser` refuses or misreads, in the order of the graph."""
    problems = [*_bad_ends(model.graph, parser), *_bad_constants(model.graph, parser)]
    for node in model.graph.all_nodes():
        for rule in _RULES:
            problems += rule(node, parser)
    return list(dict.fromkeys(problems))


def require_read_right(model: ir.Model, parser: Parser, source: str) -> None:
    """Raise `ExportError`, with the file's name `source`, when `parser` would take a graph and compute it otherwise."""
    misread = [problem for problem in parser_problems(model, parser) if problem.misread]
    if misread:
        more = f" (and {len(misread) - 1} more problems)" if len(misread) > 1 else ""
        raise ExportError(f"{source}: {misread[0]}{more}")


@cache
def _tables() -> OperatorTables:
    return read_record(
        OPERATORS_FILE, OperatorTables, schema=OPERATORS_SCHEMA, way_out="install nxm-export again: it is part of it"
    )


def _bad_ends(graph: ir.Graph, parser: Parser) -> Iterator[ParserProblem]:
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype is not None and value.dtype.name not in _TYPES[parser.known]:
            text = f"is {value.dtype.name}, a type that {parser.name} does not have"
            yield ParserProblem("type", str(value.name), text, parser.source)


def _bad_constants(graph: ir.Graph, parser: Parser) -> Iterator[ParserProblem]:
    graphs = {id(graph): graph} | {id(node.graph): node.graph for node in graph.all_nodes() if node.graph is not None}
    for part in graphs.values():
        for value in part.initializers.values() if isinstance(part, ir.Graph) else ():
            yield from _bad_type(str(value.name), value.dtype, parser)


def _bad_type(where: str, dtype: ir.DataType | None, parser: Parser) -> Iterator[ParserProblem]:
    if dtype is not None and dtype.name not in _TYPES[parser.known]:
        text = f"a constant of type {dtype.name}, which {parser.name}'s parser refuses; store INT8, INT32 or floats"
        yield ParserProblem("type", where, text, parser.source)


def _operator(node: ir.Node, parser: Parser) -> Iterator[ParserProblem]:
    own = node.domain in _OWN_DOMAINS
    named = node.op_type if own else f"{node.op_type} of {node.domain}"
    if not parser.takes(node.op_type):
        text = f"{parser.name} has no operator {named}: its parser refuses the file, unless a plugin has that name"
        yield ParserProblem("operator", _name(node), f"{text}; {_way_out(node)}", parser.source)
    elif not own and (node.domain not in _SAME_BY_NAME or node.op_type in _NOT_THE_SAME):
        text = f"{parser.name} looks at no domain and reads {named} as ONNX's {node.op_type}"
        yield ParserProblem("domain", _name(node), f"{text}; {_way_out(node)}", parser.source, misread=True)


def _way_out(node: ir.Node) -> str:
    if node.op_type in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear") or node.op_type.startswith("QLinear"):
        return "quantize with QuantizeLinear and DequantizeLinear pairs instead (QDQ format)"
    if node.domain not in _OWN_DOMAINS:
        return "give the file as it was before ONNX Runtime optimised it, in ONNX's own operators"
    return "write it with other operators"


def _constant_node(node: ir.Node, parser: Parser) -> Iterator[ParserProblem]:
    if node.op_type != "Constant" or node.domain not in _OWN_DOMAINS:
        return
    if other := {"sparse_value", "value_string", "value_strings"} & set(node.attributes):
        text = f"a constant by {other.pop()}, which {parser.name}'s parser refuses; store it as a dense tensor"
        yield ParserProblem("type", _name(node), text, parser.source)
    if "value" in node.attributes:
        yield from _bad_type(_name(node), node.attributes["value"].as_tensor().dtype, parser)


def _unmade_input(node: ir.Node, parser: Parser) -> Iterator[ParserProblem]:
    for value in node.inputs:
        if value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer():
            continue
        text = f"reads {value.name}, which no node makes and no dense initializer holds; {parser.name} refuses the file"
        yield ParserProblem("unmade", _name(node), text, parser.source)


def _cast(node: ir.Node, parser: Parser) -> Iterator[ParserProblem]:
    if node.op_type != "Cast" or "to" not in node.attributes:
        return
    dtype = ir.DataType(node.attributes["to"].as_int()).name
    inside = dtype == "UINT8" and not node.outputs[0].is_graph_output()
    if dtype not in _TYPES[parser.known] or inside:
        text = f"casts to {dtype}, which {parser.name}'s parser refuses{' inside a graph' if inside else ''}"
        yield ParserProblem("type", _name(node), text, parser.source)


def _quantizer_types(node: ir.Node, parser: Parser) -> Iterator[ParserProblem]:
    """What a QuantizeLinear writes, and what a DequantizeLinear reads."""
    if node.op_type not in _QUANTIZERS:
        return
    named = _name(node)
    written = codes_type(node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0])
    zero = codes_type(node.inputs[2]) if len(node.inputs) > 2 else None
    if written == "UINT8" and node.op_type == "QuantizeLinear" and (zero or "output_dtype" not in node.attributes):
        text = (
            f"quantizes to UINT8{'' if zero else ', which ONNX means when there is no zero point'}, and {parser.name} "
            "computes INT8 instead: codes above 127 become 127. Quantize to INT8, with an INT8 zero point 0"
        )
        if zero or parser.known != "8.6":
            yield ParserProblem("uint8", named, text, parser.source, misread=True)
    elif written == "UINT8" and quantizer_behind(node.inputs[0]) is not None:
        pass  # said of its QuantizeLinear
    elif written is not None and written not in _CODES[parser.known]:
        verb = "quantizes to" if node.op_type == "QuantizeLinear" else "dequantizes"
        bias = "; leave the bias in float" if written == "INT32" else "; quantize to INT8"
        text = f"{verb} {written}, and {parser.name}'s parser refuses that{bias}"
        yield ParserProblem("codes", named, text, parser.source)
    if parser.known == "8.6" and zero is None:
        yield ParserProblem(
            "no-zero-point",
            named,
            f"has no zero point, and {parser.name} requires one: give an INT8 zero",
            parser.source,
        )


def _quantizer_shapes(node: ir.Node, parser: Parser) -> Iterator[ParserProblem]:
    """Scales and zero points by shape and type; `nxm verify` looks at their values."""
    if node.op_type not in _QUANTIZERS:
        return
    named, scale = _name(node), array_of(node.inputs[1])
    zero = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    blocked = "block_size" in node.attributes and node.attributes["block_size"].as_int() > 0
    if scale is None:
        return
    if zero is not None and zero.size != scale.size:
        text = f"has {zero.size} zero points and {scale.size} scales, and {parser.name} wants as many"
        yield ParserProblem("zero-points", named, text, parser.source)
    if scale.size == 0 or (scale.ndim > 1 and not blocked):
        text = f"has scales of shape {scale.shape}; {parser.name} takes one, or one per channel in one dimension"
        yield ParserProblem("scale-shape", named, text, parser.source)
    shape = _shape(node.inputs[0])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if scale.size > 1 and not blocked and shape is not None:
        size = shape[axis] if -len(shape) <= axis < len(shape) else None
        if size is None or (isinstance(size, int) and size != scale.size):
            text = f"has {scale.size} scales along axis {axis} of shape {shape}, and {parser.name} refuses that"
            yield ParserProblem("scale-count", named, text, parser.source)
    if parser.known == "8.6":
        dtype = None if node.inputs[1] is None else node.inputs[1].dtype
        if blocked:
            yield ParserProblem("blocks", named, f"{parser.name} has no scales in blocks", parser.source)
        if dtype is not None and dtype.name not in ("FLOAT", "DOUBLE"):
            text = f"{parser.name} reads its scale as float32, and it is {dtype.name}; make the graph float32"
            yield ParserProblem("scale-type", named, text, parser.source, misread=True)


def _odd_int4(node: ir.Node, parser: Parser) -> Iterator[ParserProblem]:
    """Two INT4 codes are one byte, so that rows of an odd length cannot be."""
    if parser.known != "10.1" or node.op_type not in _QUANTIZERS:
        return
    shape = _shape(node.inputs[0])
    last = shape[-1] if shape else None
    written = codes_type(node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0])
    if written == "INT4" and isinstance(last, int) and last % 2:
        yield ParserProblem("int4", _name(node), f"INT4 with an odd last dimension, {last}", parser.source)


def _shape_slice(node: ir.Node, parser: Parser) -> Iterator[ParserProblem]:
    """8.6 has Shape as opset 13 had it."""
    if parser.known != "8.6" or node.op_type != "Shape":
        return
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    if start or "end" in node.attributes:
        text = f"{parser.name} ignores start and end of Shape, and gives all sizes; use Shape and Slice"
        yield ParserProblem("shape", _name(node), text, parser.source, misread=True)


_RULES: tuple[Callable[[ir.Node, Parser], Iterator[ParserProblem]], ...] = (
    _operator,
    _constant_node,
    _unmade_input,
    _cast,
    _quantizer_types,
    _quantizer_shapes,
    _odd_int4,
    _shape_slice,
)


def _shape(value: ir.Value | None) -> list[int | None] | None:
    """The shape of a value, also behind nodes that keep or turn it; None for a size that the graph does not say."""
    turned: list[ir.Node] = []
    shape: list[int | None] | None = None
    for moved in values_behind(value, ("Cast", "Identity", "Transpose", *_QUANTIZERS)):
        if moved.shape is not None:
            shape = [size if isinstance(size, int) else None for size in moved.shape]
            break
        if (node := moved.producer()) is not None and node.op_type == "Transpose":
            turned.append(node)
    if shape is None:
        return None
    for node in reversed(turned):
        order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else list(range(len(shape)))[::-1]
        if sorted(order) != list(range(len(shape))):
            return None
        shape = [shape[axis] for axis in order]
    return shape


def _name(node: ir.Node) -> str:
    return node.name or f"{node.op_type} of {node.outputs[0].name}"
