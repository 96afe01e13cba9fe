"""ONNX's operators on torch tensors, as far as encoder graphs use them; others are refused by name when an engine is
built.

What decides on shapes (`HOST`) is a tuple of numbers, known before anything runs, so that a CUDA graph can hold the
rest. Quantizers are computed in float32, whatever the graph's float type is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from engines.cusparselt.program import ATTENTION, LINEAR, Attribute
from nxm_export.errors import EngineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Numbers = tuple[int, ...]
Attributes = Mapping[str, Attribute]
# Which inputs must be numbers: they make shapes.
HOST: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Slice": (1, 2, 3, 4),
    "Unsqueeze": (1,),
    "Squeeze": (1,),
    "Split": (1,),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "ReduceSum": (1,),
    "ReduceMean": (1,),
    "ReduceL2": (1,),
}
_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}  # ONNX's numbers of element types


class Inputs:
    """The inputs of one step, read by their position."""

    def __init__(self, op: str, values: Sequence[Tensor | Numbers | None], attributes: Attributes) -> None:
        self.op, self._values, self._attributes = op, values, attributes

    def __len__(self) -> int:
        return len(self._values)

    def tensor(self, at: int) -> Tensor:
        """An input that must be there."""
        value = self.maybe(at)
        if value is None:
            raise EngineError(f"{self.op} lacks its input {at}")
        return value

    def maybe(self, at: int) -> Tensor | None:
        """An input that may be left out."""
        value = self._values[at] if at < len(self._values) else None
        return None if isinstance(value, tuple) else value

    def numbers(self, at: int) -> Numbers | None:
        """An input of `HOST`, None where it is left out."""
        value = self._values[at] if at < len(self._values) else None
        return value if isinstance(value, tuple) else None

    def tensors(self) -> list[Tensor]:
        """All inputs."""
        return [self.tensor(at) for at in range(len(self))]

    def whole(self, name: str, default: int) -> int:
        """An attribute that is a whole number."""
        value = self._attributes.get(name, default)
        if not isinstance(value, int):
            raise self._wrong(name, "a whole number", value)
        return value

    def number(self, name: str, default: float) -> float:
        """An attribute that is a number."""
        value = self._attributes.get(name, default)
        if not isinstance(value, (int, float)):
            raise self._wrong(name, "a number", value)
        return float(value)

    def text(self, name: str, default: str) -> str:
        """An attribute that is a text."""
        value = self._attributes.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        return value

    def whole_numbers(self, name: str) -> Numbers | None:
        """An attribute that is a list of whole numbers."""
        value = self._attributes.get(name)
        if value is not None and not isinstance(value, tuple):
            raise self._wrong(name, "a list of whole numbers", value)
        return value

    def _wrong(self, name: str, expected: str, value: Attribute) -> EngineError:
        return EngineError(f"{self.op}: attribute {name} must be {expected}, got {value!r}; build the engine again")


def compute(op: str, values: Sequence[Tensor | Numbers | None], attributes: Attributes) -> tuple[Tensor, ...]:
    """The outputs of an operator; raises `EngineError` for one that is not known here."""
    made = _table()[op](Inputs(op, values, attributes))
    return made if isinstance(made, tuple) else (made,)


def known(op: str) -> bool:
    """Whether an operator can be computed here."""
    return op in _table()


def quantized(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1) -> Tensor:
    """ONNX's QuantizeLinear to the type of `zero` (INT8 without), in float32."""
    import torch

    dtype = torch.int8 if zero is None else zero.dtype
    info = torch.iinfo(dtype)
    codes = torch.round(x.float() / _along(scale.float(), x, axis))
    if zero is not None:
        codes = codes + _along(zero.float(), x, axis)
    return codes.clamp(info.min, info.max).to(dtype)


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1) -> Tensor:
    """ONNX's DequantizeLinear, in the type of `scale`."""
    x = codes.float()
    if zero is not None:
        x = x - _along(zero.float(), codes, axis)
    return (x * _along(scale.float(), codes, axis)).to(scale.dtype)


def torch_type(name: str) -> torch.dtype:
    """torch's type of a NumPy name."""
    import torch

    return cast("torch.dtype", getattr(torch, name))


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Values of one axis of `like`, in a shape that broadcasts with it; a single value as it is."""
    if values.numel() == 1:
        return values.reshape(())
    sizes = [1] * like.dim()
    sizes[axis] = values.numel()
    return values.reshape(sizes)


def _gather(data: Tensor, index: Tensor, axis: int) -> Tensor:
    import torch

    axis %= data.dim()
    index = torch.where(index < 0, index + data.shape[axis], index)
    picked = torch.index_select(data, axis, index.reshape(-1))
    return picked.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])


def _gather_nd(data: Tensor, index: Tensor, batch_dims: int) -> Tensor:
    if batch_dims:
        raise EngineError("GatherND with batch_dims is not known to this engine")
    return data[tuple(index.unbind(-1))]


def _slice(x: Tensor, inputs: Inputs) -> Tensor:
    starts, ends = inputs.numbers(1) or (), inputs.numbers(2) or ()
    axes = inputs.numbers(3) or tuple(range(len(starts)))
    steps = inputs.numbers(4) or (1,) * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise EngineError("Slice backwards is not known to this engine")
        places: list[slice] = [slice(None)] * x.dim()
        places[axis] = slice(start, end, step)
        x = x[tuple(places)]
    return x


def _reshape(x: Tensor, shape: Numbers, *, zero_is_kept: bool) -> Tensor:
    return x.reshape([x.shape[at] if size == 0 and zero_is_kept else size for at, size in enumerate(shape)])


def _unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Numbers | None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes)


def _expand(x: Tensor, shape: Numbers) -> Tensor:
    """To the shape that `x` and one of `shape` broadcast to: a size of 1 there leaves the one of `x`."""
    rank = max(x.dim(), len(shape))
    own = (1,) * (rank - x.dim()) + tuple(x.shape)
    wanted = (1,) * (rank - len(shape)) + shape
    return x.expand([mine if asked == 1 else asked for mine, asked in zip(own, wanted, strict=True)])


def _split(x: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    import torch

    axis, sizes = inputs.whole("axis", 0), inputs.numbers(1)
    if sizes is not None:
        return tuple(torch.split_with_sizes(x, list(sizes), axis))
    parts = inputs.whole("num_outputs", 1)
    return tuple(torch.split_with_sizes(x, _equal_parts(x.shape[axis], parts), axis))


def _equal_parts(size: int, parts: int) -> list[int]:
    """ONNX's parts of an axis: all of one size, the last one smaller where that does not fit."""
    each = -(-size // parts)
    return [min(each, size - each * at) for at in range(parts)]


def _gemm(inputs: Inputs) -> Tensor:
    a, b, c = inputs.tensor(0), inputs.tensor(1), inputs.maybe(2)
    a = a.t() if inputs.whole("transA", 0) else a
    b = b.t() if inputs.whole("transB", 0) else b
    y = a @ b
    alpha, beta = inputs.number("alpha", 1.0), inputs.number("beta", 1.0)
    y = y if alpha == 1.0 else y * alpha
    return y if c is None else y + (c if beta == 1.0 else c * beta)


def _layer_norm(inputs: Inputs) -> Tensor:
    from torch.nn import functional

    x, axis = inputs.tensor(0), inputs.whole("axis", -1)
    return functional.layer_norm(
        x, x.shape[axis % x.dim() :], inputs.tensor(1), inputs.maybe(2), inputs.number("epsilon", 1e-5)
    )


def _attention(inputs: Inputs) -> Tensor:
    """softmax(q k^T scale + biases) v: query, transposed key (batch, heads, features, sequence), value, biases."""
    from torch.nn import functional

    query, key, value = inputs.tensor(0), inputs.tensor(1).transpose(-1, -2), inputs.tensor(2)
    mask = None
    for at in range(3, len(inputs)):
        mask = inputs.tensor(at) if mask is None else mask + inputs.tensor(at)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=inputs.number("scale", 1.0))


def _linear(inputs: Inputs) -> Tensor:
    """(..., K) times (K, N) plus (N,): one kernel where the library can add a bias."""
    import torch

    x, weight = inputs.tensor(0), inputs.tensor(1)
    y = torch.addmm(inputs.tensor(2), x.reshape(-1, weight.shape[0]), weight)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def _divide(x: Tensor, y: Tensor) -> Tensor:
    import torch

    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _reduced(inputs: Inputs, reduce: Callable[[Tensor, Numbers, bool], Tensor]) -> Tensor:
    x = inputs.tensor(0)
    axes = inputs.numbers(1) or inputs.whole_numbers("axes") or tuple(range(x.dim()))
    return reduce(x, axes, bool(inputs.whole("keepdims", 1)))


def _extreme(inputs: Inputs, two: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    first, *others = inputs.tensors()
    for other in others:
        first = two(first, other)
    return first


def _clip(inputs: Inputs) -> Tensor:
    import torch

    x, low, high = inputs.tensor(0), inputs.maybe(1), inputs.maybe(2)
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _range(inputs: Inputs) -> Tensor:
    """Of numbers on the host: `Executor` runs it there alone."""
    import torch

    start, limit, delta = inputs.tensors()
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    return start + delta * torch.arange(count, dtype=start.dtype)


def _filled(inputs: Inputs) -> Tensor:
    import torch

    value = inputs.maybe(1)  # the attribute, which lowering makes an input
    shape = inputs.numbers(0) or ()
    return torch.zeros(shape) if value is None else value.reshape(()).expand(shape).contiguous()


Operator = Callable[[Inputs], "Tensor | tuple[Tensor, ...]"]
_TABLE: dict[str, Operator] = {}


def _table() -> Mapping[str, Operator]:
    """The operators by name, made once: torch is imported when it is asked for."""
    if not _TABLE:
        _TABLE.update(_elementwise())
        _TABLE.update(_shaping())
        _TABLE.update(_numeric())
    return _TABLE


def _elementwise() -> dict[str, Operator]:
    import torch

    def unary(function: Callable[[Tensor], Tensor]) -> Operator:
        return lambda inputs: function(inputs.tensor(0))

    def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
        return lambda inputs: function(inputs.tensor(0), inputs.tensor(1))

    return {
        **{
            name: unary(getattr(torch, name.lower()))
            for name in ("Abs", "Cos", "Erf", "Exp", "Log", "Neg", "Sigmoid", "Sin", "Sqrt", "Tanh", "Relu")
        },
        "Not": unary(torch.logical_not),
        "Identity": unary(lambda x: x),
        "Add": binary(torch.add),
        "Sub": binary(torch.sub),
        "Mul": binary(torch.mul),
        "Div": binary(_divide),
        "Pow": binary(lambda x, y: torch.pow(x, y).to(x.dtype)),
        "MatMul": binary(torch.matmul),
        "And": binary(torch.logical_and),
        "Or": binary(torch.logical_or),
        "Equal": binary(torch.eq),
        "Less": binary(torch.lt),
        "LessOrEqual": binary(torch.le),
        "Greater": binary(torch.gt),
        "GreaterOrEqual": binary(torch.ge),
        "Max": lambda inputs: _extreme(inputs, torch.maximum),
        "Min": lambda inputs: _extreme(inputs, torch.minimum),
        "Clip": _clip,
        "Where": lambda inputs: torch.where(inputs.tensor(0), inputs.tensor(1), inputs.tensor(2)),
        "Cast": lambda inputs: inputs.tensor(0).to(torch_type(_TYPES[inputs.whole("to", 1)])),
    }


def _shaping() -> dict[str, Operator]:
    import torch

    return {
        "Reshape": lambda inputs: _reshape(
            inputs.tensor(0), inputs.numbers(1) or (), zero_is_kept=not inputs.whole("allowzero", 0)
        ),
        "Transpose": lambda inputs: inputs.tensor(0).permute(
            inputs.whole_numbers("perm") or tuple(reversed(range(inputs.tensor(0).dim())))
        ),
        "Unsqueeze": lambda inputs: _unsqueeze(inputs.tensor(0), inputs.numbers(1) or ()),
        "Squeeze": lambda inputs: _squeeze(inputs.tensor(0), inputs.numbers(1)),
        "Expand": lambda inputs: _expand(inputs.tensor(0), inputs.numbers(1) or ()),
        "Concat": lambda inputs: torch.cat(inputs.tensors(), inputs.whole("axis", 0)),
        "Split": lambda inputs: _split(inputs.tensor(0), inputs),
        "Slice": lambda inputs: _slice(inputs.tensor(0), inputs),
        "Gather": lambda inputs: _gather(inputs.tensor(0), inputs.tensor(1), inputs.whole("axis", 0)),
        "GatherElements": lambda inputs: torch.gather(inputs.tensor(0), inputs.whole("axis", 0), inputs.tensor(1)),
        "GatherND": lambda inputs: _gather_nd(inputs.tensor(0), inputs.tensor(1), inputs.whole("batch_dims", 0)),
        "Range": _range,
        "ConstantOfShape": _filled,
    }


def _numeric() -> dict[str, Operator]:
    import torch
    from torch.nn import functional

    return {
        "Gemm": _gemm,
        "LayerNormalization": _layer_norm,
        "Softmax": lambda inputs: torch.softmax(inputs.tensor(0), inputs.whole("axis", -1)),
        "Gelu": lambda inputs: functional.gelu(inputs.tensor(0), approximate=inputs.text("approximate", "none")),
        "CumSum": lambda inputs: torch.cumsum(inputs.tensor(0), (inputs.numbers(1) or (0,))[0]).to(
            inputs.tensor(0).dtype
        ),
        "ReduceSum": lambda inputs: _reduced(inputs, lambda x, axes, keep: x.sum(axes, keepdim=keep)),
        "ReduceMean": lambda inputs: _reduced(inputs, lambda x, axes, keep: x.mean(axes, keepdim=keep)),
        "ReduceL2": lambda inputs: _reduced(
            inputs, lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
        ),
        "QuantizeLinear": lambda inputs: quantized(
            inputs.tensor(0), inputs.tensor(1), inputs.maybe(2), inputs.whole("axis", 1)
        ),
        "DequantizeLinear": lambda inputs: dequantized(
            inputs.tensor(0), inputs.tensor(1), inputs.maybe(2), inputs.whole("axis", 1)
        ),
        ATTENTION: _attention,
        LINEAR: _linear,
    }
