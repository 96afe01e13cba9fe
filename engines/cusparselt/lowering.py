"""A Q/DQ graph becomes a `Program`: products of INT8 pairs and attentions in forms of their own, the rest step by step.

The graph is where everything comes from, weights' integers, scales and pattern, embeddings, norms and head: it is what
the other engines read, so that all families that can be exported run here, and twins differ in nothing else. What is no
product of INT8 pairs runs in the graph's float type, which is why graphs of target ``trt`` (FP16) are meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from engines.cusparselt.operators import known
from engines.cusparselt.program import ATTENTION, LINEAR, PRODUCT, Attribute, Choice, Product, Program, Step
from engines.tensorrt.profiles import graph_inputs
from nxm_export.errors import EngineError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_SHAPE = "Shape"


@dataclass(frozen=True)
class Lowered:
    """A program without choices, and the tensors that it names."""

    program: Program
    tensors: Mapping[str, torch.Tensor]

    def with_choices(self, choices: tuple[Choice, ...]) -> Lowered:
        """The same, with what was chosen for its products."""
        return replace(self, program=replace(self.program, choices=choices))


@dataclass(frozen=True)
class _Weight:
    """Codes (N, K) of a product, scales (N,), and the name that they have in the graph."""

    name: str
    codes: np.ndarray
    scales: np.ndarray


@dataclass(frozen=True)
class _Found:
    """A product with what its kernel does on the way out: `last` makes the value `result`."""

    product: Product
    codes: ir.Value
    result: ir.Value
    absorbed: tuple[ir.Node, ...]


def lowered(model: ir.Model, source: str) -> Lowered:
    """The program of a graph; `source` names the file in errors. Raises `EngineError` for what is not known here."""
    return _Lowering(model, source).made()


class _Lowering:
    def __init__(self, model: ir.Model, source: str) -> None:
        self._graph, self._model, self._source = model.graph, model, source
        self._tensors: dict[str, torch.Tensor] = {}
        self._products: dict[str, Product] = {}
        self._two_four: dict[str, bool] = {}
        made = (value.name for node in self._graph for value in node.outputs)
        self._in_graph = {*self._graph.initializers, *(value.name for value in self._graph.inputs), *made}
        self._attention = {"fused": 0, "in parts": 0, "operands on their INT8 grid": 0}

    def made(self) -> Lowered:
        products = {id(node): found for node in self._graph if (found := self._product(node)) is not None}
        attentions = {id(node): fused for node in self._graph if (fused := _attention_of(node)) is not None}
        linears = {id(node): add for node in self._graph if id(node) not in products and (add := _bias_of(node))}
        absorbed = {id(node) for part in products.values() for node in part.absorbed} | {
            id(a) for a in linears.values()
        }
        absorbed |= {id(node) for part in attentions.values() for node in part.absorbed}
        steps: list[Step] = []
        for node in self._graph:
            if id(node) in products:
                steps.append(self._product_step(node, products[id(node)]))
            elif id(node) in attentions:
                steps.append(self._attention_step(node, attentions[id(node)]))
            elif id(node) in linears:
                steps.append(_linear_step(node, linears[id(node)]))
            elif id(node) not in absorbed:
                steps.append(self._step(node))
                self._count_softmax(node)
        outputs = tuple(str(value.name) for value in self._graph.outputs)
        live = tuple(_live(steps, outputs))
        self._require_known(live)
        self._keep_constants(live, outputs)
        program = Program(graph_inputs(self._model), outputs, live, self._products, self._attention)
        return Lowered(program, self._tensors)

    def _product(self, node: ir.Node) -> _Found | None:
        """The product of INT8 pairs that a node is, None for any other."""
        left = _dequantized(node.inputs[0]) if node.op_type in ("MatMul", "Gemm") and not node.domain else None
        weight = None if left is None or not _is_activation(left) else _weight(node)
        if left is None or weight is None or not _plain(node, len(weight.codes)):
            return None
        n, k = weight.codes.shape
        last, bias, absorbed = _bias_behind(node, n)
        quantizer = _output_quantizer(last)
        alpha = _scale(left) * weight.scales.astype(np.float64)
        output, result = _float_type(left), last.outputs[0]
        if quantizer is not None:
            alpha, output, result = alpha / _scale(quantizer), "int8", quantizer.outputs[0]
            bias = None if bias is None else bias.astype(np.float64) / _scale(quantizer)
            absorbed = (*absorbed, quantizer)
        name = self._name(node)
        codes_name = self._add(weight.name, weight.codes)
        if codes_name not in self._two_four:
            self._two_four[codes_name] = _is_two_four(weight.codes)
        product = Product(
            name=weight.name.removesuffix(".codes"),
            weight=codes_name,
            alpha=self._add(f"{name}.alpha", alpha.astype(np.float32)),
            bias=None if bias is None else self._add(f"{name}.bias", bias.astype(np.float32)),
            k=k,
            n=n,
            output=output,
            two_four=self._two_four[codes_name],
        )
        codes = left.inputs[0]
        assert codes is not None
        return _Found(product, codes, result, absorbed)

    def _product_step(self, node: ir.Node, found: _Found) -> Step:
        name = self._name(node)
        if name in self._products:
            raise EngineError(
                f"{self._source}: two products are named {name!r}, and this engine and its report know them by their "
                "names; give every node a name of its own"
            )
        self._products[name] = found.product
        return Step(PRODUCT, (str(found.codes.name),), (str(found.result.name),), {"product": name})

    def _attention_step(self, node: ir.Node, found: _Attention) -> Step:
        self._attention["fused"] += 1
        self._count_operands((found.query, found.key, found.value))
        names = [str(value.name) for value in (found.query, found.key, found.value, *found.biases)]
        return Step(ATTENTION, tuple(names), (str(node.outputs[0].name),), {"scale": found.scale})

    def _count_softmax(self, node: ir.Node) -> None:
        if node.op_type == "Softmax":
            self._attention["in parts"] += 1
            made = node.outputs[0]
            self._count_operands(tuple(v for user in made.consumers() for v in user.inputs if v is not None), made)

    def _count_operands(self, operands: tuple[ir.Value, ...], probabilities: ir.Value | None = None) -> None:
        from nxm_export.graph.quantized_values import input_codes

        rounded = any(input_codes(value) for value in operands)
        rounded |= probabilities is not None and any(u.op_type == "QuantizeLinear" for u in probabilities.consumers())
        self._attention["operands on their INT8 grid"] += rounded

    def _step(self, node: ir.Node) -> Step:
        """Any other node, as it is."""
        if node.domain not in ("", "ai.onnx"):
            raise self._refusal([f"{node.domain}::{node.op_type}"])
        if node.op_type == "Constant":
            return self._constant_step(node)
        attributes: dict[str, Attribute] = {}
        inputs = [str(value.name) if value is not None else "" for value in node.inputs]
        for name, attribute in node.attributes.items():
            value = attribute.value
            if name == "block_size" and value:
                raise self._refusal([f"{node.op_type} in blocks"])
            if name == "value" and node.op_type == "ConstantOfShape":
                inputs.append(self._add(f"{node.outputs[0].name}.value", value.numpy()))
            elif isinstance(value, (int, float, str)):
                attributes[name] = value
            elif isinstance(value, (tuple, list)):
                if not all(isinstance(entry, int) for entry in value):
                    raise self._refusal([f"{node.op_type} with {name}"])
                attributes[name] = tuple(value)
        if node.op_type == "QuantizeLinear" and (len(inputs) < 3 or not inputs[2]):
            inputs = [*inputs[:2], self._zero(attributes.pop("output_dtype", 0))]
        return Step(node.op_type, tuple(inputs), tuple(str(value.name) for value in node.outputs), attributes)

    def _constant_step(self, node: ir.Node) -> Step:
        """A constant that is a node, in whichever form it is written."""
        import onnx_ir as ir

        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            raise self._refusal([f"Constant with {', '.join(node.attributes)}"])
        output = str(node.outputs[0].name)
        return Step("Identity", (self._add(f"{output}.value", tensor.numpy()),), (output,), {})

    def _zero(self, dtype: Attribute) -> str:
        """The name of a zero point 0 of ONNX's element type, UINT8 where it says none."""
        name = {3: "int8", 0: "uint8", 2: "uint8"}.get(int(dtype)) if isinstance(dtype, int) else None
        if name is None:
            raise self._refusal([f"QuantizeLinear to the element type {dtype}"])
        return self._add(f"nxm.zero.{name}", np.zeros((), name))

    def _name(self, node: ir.Node) -> str:
        from nxm_export.graph.reading.products import name_of

        return name_of(node)

    def _add(self, name: str, array: np.ndarray) -> str:
        """Keep a tensor under `name`, or under a longer one where the graph or another tensor has that; returns it."""
        tensor = _tensor(array)
        while name in self._in_graph or not _is_same(self._tensors.setdefault(name, tensor), tensor):
            name += "_"
        return name

    def _keep_constants(self, steps: tuple[Step, ...], outputs: tuple[str, ...]) -> None:
        """Keep the constants that steps read, and of the products' tensors those that are read."""
        read = {name for step in steps for name in step.inputs} | set(outputs)
        parts = [(product.weight, product.alpha, product.bias) for product in self._products.values()]
        read |= {name for names in parts for name in names if name}
        for name, value in self._graph.initializers.items():
            if name in read and value.const_value is not None:
                self._tensors[name] = _tensor(value.const_value.numpy())
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in read}

    def _require_known(self, steps: tuple[Step, ...]) -> None:
        unknown = {step.op for step in steps if not (known(step.op) or step.op in (PRODUCT, _SHAPE))}
        if unknown:
            raise self._refusal(sorted(unknown))

    def _refusal(self, operators: list[str]) -> EngineError:
        return EngineError(
            f"{self._source}: this engine does not know {', '.join(operators)}; export it with `nxm export "
            "--target trt --lowering matmul`, or build it with another backend"
        )


@dataclass(frozen=True)
class _Attention:
    """softmax(query key scale + biases) value; key is (batch, heads, features, sequence)."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    biases: tuple[ir.Value, ...]
    absorbed: tuple[ir.Node, ...]


def _attention_of(node: ir.Node) -> _Attention | None:
    """The attention whose last product a node is; None for any other form."""
    softmax = _only(node.inputs[0], "Softmax") if node.op_type == "MatMul" else None
    if softmax is None or _rank(node.outputs[0]) != 4 or _axis(softmax) not in (-1, 3):
        return None
    absorbed, biases = [softmax], []
    value = softmax.inputs[0]
    while (add := _only(value, "Add")) is not None:
        towards = next((at for at in (0, 1) if _leads_to_scores(add.inputs[at])), None)
        if towards is None:
            return None
        absorbed.append(add)
        biases.append(add.inputs[1 - towards])
        value = add.inputs[towards]
    scale, scaled = 1.0, _only(value, "Mul") or _only(value, "Div")
    if scaled is not None:
        factor = _numbers(scaled.inputs[1])
        if factor is None or factor.size != 1 or not float(factor.reshape(())):
            return None
        scale = float(factor.reshape(()))
        scale = 1.0 / scale if scaled.op_type == "Div" else scale
        absorbed.append(scaled)
        value = scaled.inputs[0]
    scores = _only(value, "MatMul")
    if scores is None:
        return None
    absorbed.append(scores)
    query, key, context = scores.inputs[0], scores.inputs[1], node.inputs[1]
    if query is None or key is None or context is None or not all(_rank(v) == 4 for v in (query, key, context)):
        return None
    kept = [bias for bias in biases if bias is not None]
    if any(bias.dtype != query.dtype or _rank(bias) is None for bias in kept):
        return None
    return _Attention(query, key, context, scale, tuple(kept), tuple(absorbed))


def _bias_of(node: ir.Node) -> ir.Node | None:
    """The Add of a constant for each channel that alone reads a float product with a constant matrix."""
    matrix = _numbers(node.inputs[1]) if node.op_type == "MatMul" and not node.domain else None
    add = None if matrix is None or matrix.ndim != 2 else _reader(node.outputs[0], "Add")
    if add is None or matrix is None:
        return None
    bias = _numbers(_added(add, node))
    return add if bias is not None and bias.shape == matrix.shape[1:] else None


def _linear_step(node: ir.Node, add: ir.Node) -> Step:
    bias = _added(add, node)
    names = [str(value.name) for value in (*node.inputs, bias) if value is not None]
    return Step(LINEAR, tuple(names), (str(add.outputs[0].name),), {})


def _leads_to_scores(value: ir.Value | None) -> bool:
    """Whether a value is made of a product of two activations by scaling and adding alone."""
    node = None if value is None else value.producer()
    if node is None or value is None or len(value.uses()) != 1:
        return False
    if node.op_type in ("Mul", "Div", "Add"):
        return any(_leads_to_scores(read) for read in node.inputs[: 2 if node.op_type == "Add" else 1])
    return node.op_type == "MatMul" and _rank(value) == 4


def _live(steps: list[Step], outputs: tuple[str, ...]) -> Iterator[Step]:
    """The steps that outputs depend on, in their order."""
    needed, kept = set(outputs), []
    for step in reversed(steps):
        if needed & set(step.outputs):
            kept.append(step)
            needed |= set(step.inputs)
    return reversed(kept)


def _weight(node: ir.Node) -> _Weight | None:
    """The INT8 matrix of a product with one scale or one for each output channel; None for others."""
    dequantize = _dequantized(node.inputs[1])
    codes = None if dequantize is None else _codes(dequantize.inputs[0])
    if dequantize is None or codes is None or codes.ndim != 2 or not _zero_at_zero(dequantize):
        return None
    transposed = node.op_type == "Gemm" and _whole(node, "transB", 0)
    channels = 0 if transposed else 1
    scale, axis = _numbers(dequantize.inputs[1]), _whole(dequantize, "axis", 1) % 2
    if scale is None:
        return None
    if scale.size != 1 and (axis != channels or scale.shape != (codes.shape[channels],)):
        return None
    matrix = np.ascontiguousarray(codes if transposed else codes.T)
    name = str(dequantize.inputs[0].name)  # type: ignore[union-attr]  # `_codes` has looked
    name = name.removesuffix("_quantized")
    return _Weight(f"{name}.codes", matrix, np.broadcast_to(scale.reshape(-1), (matrix.shape[0],)))


def _codes(value: ir.Value | None) -> np.ndarray | None:
    """The INT8 codes of a constant, stored as such or as INT4; None for others."""
    import onnx_ir as ir

    cast = _producer(value, "Cast")
    if cast is not None and _whole(cast, "to", 0) == ir.DataType.INT8:
        value = cast.inputs[0]
    constant = None if value is None else value.const_value
    if constant is None or constant.dtype not in (ir.DataType.INT8, ir.DataType.INT4):
        return None
    return constant.numpy().astype(np.int8)


def _is_two_four(codes: np.ndarray) -> bool:
    """Whether at most two of every four along K are other than 0."""
    n, k = codes.shape
    return k % 4 == 0 and bool(((codes.reshape(n, k // 4, 4) != 0).sum(axis=-1) <= 2).all())


def _bias_behind(node: ir.Node, features: int) -> tuple[ir.Node, np.ndarray | None, tuple[ir.Node, ...]]:
    """(node that makes the result, bias, nodes behind the product that are part of it)."""
    if node.op_type == "Gemm" and len(node.inputs) > 2:
        return node, _numbers(node.inputs[2]), ()
    add = _reader(node.outputs[0], "Add")
    if add is not None:
        bias = _numbers(_added(add, node))
        if bias is not None and bias.shape == (features,):
            return add, bias, (add,)
    return node, None, ()


def _added(add: ir.Node, product: ir.Node) -> ir.Value | None:
    """What an Add that reads a product once adds to it."""
    return next(value for value in add.inputs if value is not product.outputs[0])


def _plain(node: ir.Node, features: int) -> bool:
    """Whether a product is one without factors, with a bias for each channel where a Gemm has one."""
    bias = _numbers(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(features)
    factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
    return (
        not _whole(node, "transA", 0)
        and all(f == 1.0 for f in factors)
        and bias is not None
        and bias.shape == (features,)
    )


def _output_quantizer(last: ir.Node) -> ir.Node | None:
    """The quantizer to INT8 that alone reads a product."""
    quantizer = _reader(last.outputs[0], "QuantizeLinear")
    if quantizer is None or not _zero_at_zero(quantizer) or not _is_int8(quantizer.outputs[0]):
        return None
    scale = _numbers(quantizer.inputs[1])
    return quantizer if scale is not None and scale.size == 1 else None


def _is_activation(node: ir.Node) -> bool:
    """Whether a DequantizeLinear gives back an activation: INT8 codes, one scale, zero point 0."""
    codes, scale = node.inputs[0], _numbers(node.inputs[1])
    if codes is None or codes.const_value is not None or scale is None or scale.size != 1:
        return False
    return _zero_at_zero(node) and _is_int8(codes)


def _is_int8(codes: ir.Value | None) -> bool:
    from nxm_export.graph.quantized_values import codes_type

    return codes_type(codes) == "INT8"


def _zero_at_zero(node: ir.Node) -> bool:
    """Whether the zero point of a quantizer is 0."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    zero = _numbers(node.inputs[2])
    return zero is not None and not np.any(zero)


def _scale(node: ir.Node) -> float:
    """The one scale of a quantizer, which has one."""
    scale = _numbers(node.inputs[1])
    assert scale is not None
    return float(scale.reshape(()))


def _float_type(dequantize: ir.Node) -> str:
    """NumPy's name of the type that a product of dequantized values is in."""
    scale = dequantize.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64"}
    return names.get(scale.const_value.dtype.name, "float32")


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.name in ("int4", "uint4"):
        array = array.astype(np.int8 if array.dtype.name == "int4" else np.uint8)
    return torch.from_numpy(np.array(array))


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one is other or (one.dtype is other.dtype and one.shape == other.shape and torch.equal(one, other))


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    """A constant as NumPy's floats or integers; None for others."""
    if value is None or value.const_value is None:
        return None
    array = value.const_value.numpy()
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _whole(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _axis(node: ir.Node) -> int:
    return _whole(node, "axis", -1)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    return _producer(value, "DequantizeLinear")


def _only(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of type `op` that made `value`, where that is read once."""
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return _producer(value, op) if alone else None


def _reader(value: ir.Value, op: str) -> ir.Node | None:
    """The one node that reads `value`, once, where it is of type `op`."""
    uses = list(value.uses())
    alone = len(uses) == 1 and uses[0].node.op_type == op and not value.is_graph_output()
    return uses[0].node if alone else None
