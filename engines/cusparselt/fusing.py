"""Runs of steps between products become one function each, which torch can compile: quantizers, GELU, residuals, norms.

Functions are made once for each form: layers that look alike share one, and what it takes are tensors alone. So a model
has few of them to compile, whatever its depth.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.cusparselt.operators import Numbers, compute
from engines.cusparselt.program import Attribute, Step

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., "tuple[Tensor, ...]"]
Compile = Callable[[Function], Function]
# One kernel can do any number of these in a row. What moves elements is no work, or is left to a kernel of its own.
FUSED = frozenset(
    {
        *(
            "Abs",
            "Add",
            "And",
            "Cast",
            "Clip",
            "Cos",
            "DequantizeLinear",
            "Div",
            "Equal",
            "Erf",
            "Exp",
            "Gelu",
            "Greater",
        ),
        *("GreaterOrEqual", "Identity", "LayerNormalization", "Less", "LessOrEqual", "Log", "Max", "Min", "Mul", "Neg"),
        *("Not", "Or", "Pow", "QuantizeLinear", "Relu", "Sigmoid", "Sin", "Sqrt", "Sub", "Tanh", "Where"),
    }
)


@dataclass(frozen=True)
class Given:
    """An input of a fused step: the function's own argument at a place, or, with `made`, what a step before it made."""

    place: int
    made: bool = False


@dataclass(frozen=True)
class FusedStep:
    """One step of a form, with nothing in it that differs between layers."""

    op: str
    inputs: tuple[Given | Numbers | None, ...]
    attributes: tuple[tuple[str, Attribute], ...]


@dataclass(frozen=True)
class FusedForm:
    """Steps in a row, and which of the values that they make leave the function."""

    steps: tuple[FusedStep, ...]
    outputs: tuple[int, ...]


class Fuser:
    """Makes the function of every form, compiled by `compile_`, once."""

    def __init__(self, compile_: Compile) -> None:
        self._compile = compile_
        self._made: dict[FusedForm, Function] = {}

    def function(self, form: FusedForm) -> Function:
        """The function of a form: tensors in the order of its arguments to a tuple of outputs."""
        if form not in self._made:
            self._made[form] = self._compile(with_own_code(_running(form), f"nxm_fused_{len(self._made)}"))
        return self._made[form]


def _running(form: FusedForm) -> Function:
    steps = [(step.op, step.inputs, dict(step.attributes)) for step in form.steps]
    outputs = form.outputs

    def fused(*arguments: Tensor) -> tuple[Tensor, ...]:
        values: list[Tensor] = []
        for op, inputs, attributes in steps:
            given: list[Tensor | Numbers | None] = [
                (values if each.made else arguments)[each.place] if isinstance(each, Given) else each for each in inputs
            ]
            values.extend(compute(op, given, attributes))
        return tuple(values[place] for place in outputs)

    return fused


def with_own_code(function: Function, name: str) -> Function:
    """The same function with code of its own: torch counts how often it compiles a piece of code, and then stops."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


@dataclass(frozen=True)
class FusedRun:
    """Steps in a row as one call: the names of what they make and leave, and the arguments, names or constants."""

    form: FusedForm
    arguments: tuple[str | Tensor, ...]
    outputs: tuple[str, ...]


def fused_run(
    steps: Sequence[tuple[Step, tuple[str | Tensor | Numbers | None, ...]]], read_later: frozenset[str]
) -> FusedRun:
    """One call for steps in a row; `read_later` are the names that anything after them reads."""
    arguments: list[str | Tensor] = []
    places: dict[str | int, int] = {}
    made: dict[str, int] = {}
    fused: list[FusedStep] = []
    for step, inputs in steps:
        given: list[Given | Numbers | None] = []
        for value in inputs:
            if value is None or isinstance(value, tuple):
                given.append(value)
            elif isinstance(value, str) and value in made:
                given.append(Given(made[value], made=True))
            else:
                key = value if isinstance(value, str) else id(value)
                if key not in places:
                    places[key] = len(arguments)
                    arguments.append(value)
                given.append(Given(places[key]))
        fused.append(FusedStep(step.op, tuple(given), tuple(sorted(step.attributes.items()))))
        made.update({name: len(made) + at for at, name in enumerate(step.outputs)})
    left = tuple(name for name in made if name in read_later)
    return FusedRun(FusedForm(tuple(fused), tuple(made[name] for name in left)), tuple(arguments), left)
