"""Runs a `Program` on torch tensors. What depends on shapes alone is computed once for each shape, on the host; a CUDA
graph holds the rest.

The first run of a shape goes step by step and remembers what is left to do; the second one is captured. Shapes are kept
as long as `MOST_SHAPES` others have not come after them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engines.cusparselt.fusing import FUSED, Compile, Fuser, fused_run
from engines.cusparselt.kernels import DENSE, FORMS, Kernels
from engines.cusparselt.operators import HOST, Inputs, Numbers, compute, known
from engines.cusparselt.products import Products
from engines.cusparselt.program import PRODUCT, Known, Program, Step
from nxm_export.errors import EngineError, notice

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MOST_SHAPES = 96
KNOWN = Known(
    operator=lambda op: op in (PRODUCT, "Shape") or known(op), form=lambda form: form == DENSE or form in FORMS
)
_HOST_ALONE = ("Range",)  # its size is what its inputs say
Around = Callable[[str], AbstractContextManager[object]]  # of a product, by its name: what a profiler sees it in


Bound = tuple[Step, "tuple[str | Tensor | Numbers | None, ...]"]


@dataclass(frozen=True)
class BoundCall:
    """Something that runs on the device: a function of inputs, each a name, a constant, or numbers; `freed` is read no
    more after it, and `product` names the product that it is."""

    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str | Tensor | Numbers | None, ...]
    outputs: tuple[str, ...]
    freed: tuple[str, ...]
    product: str | None = None


@dataclass
class ShapePlan:
    """What is left to do at one shape; `constants` are outputs that depend on shapes alone."""

    calls: tuple[BoundCall, ...]
    constants: Mapping[str, Tensor]
    captured: CapturedRun | None = None
    refused: bool = False


@dataclass(frozen=True)
class CapturedRun:
    """A CUDA graph: where its inputs lie, what runs it, and where its outputs lie."""

    inputs: Mapping[str, Tensor]
    replay: Callable[[], None]
    outputs: Mapping[str, Tensor]


class Executor:
    """A program with its tensors on a device. Not for several threads at once."""

    def __init__(
        self, program: Program, tensors: Mapping[str, Tensor], kernels: Kernels, *, fuse: bool = False
    ) -> None:
        self.program, self.kernels = program, kernels
        compile_ = compiler(kernels, fuse=fuse)
        self.products, self._fuser = Products(program, tensors, kernels, compile_), Fuser(compile_)
        own = {name for part in program.products.values() for name in (part.weight, part.alpha, part.bias)}
        self._constants = {name: tensor for name, tensor in tensors.items() if name not in own}
        self._steps = self._without_constant_steps()
        self._frees = last_reads([(*step.outputs, *step.inputs) for step in self._steps], program.outputs)
        self._on_device: dict[str, Tensor] = {}
        self._plans: OrderedDict[tuple[tuple[int, ...], ...], ShapePlan] = OrderedDict()

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, for inputs on the device; they are the caller's until the next run."""
        plan = self.plan(feeds)
        if plan.captured is None:
            return self._eager(plan, feeds)
        for name, tensor in feeds.items():
            plan.captured.inputs[name].copy_(tensor)
        plan.captured.replay()
        return dict(plan.captured.outputs)

    def replayer(self, feeds: Mapping[str, Tensor]) -> Callable[[], object]:
        """A function that runs `feeds` again, as a CUDA graph where there can be one."""
        self.run(feeds)
        self.run(feeds)
        plan = self.plan(feeds)
        return plan.captured.replay if plan.captured is not None else lambda: self._eager(plan, feeds)

    def is_captured(self, feeds: Mapping[str, Tensor] | Mapping[str, np.ndarray]) -> bool:
        """Whether runs of this shape replay a CUDA graph."""
        plan = self._plans.get(_shape_of(feeds))
        return plan is not None and plan.captured is not None

    def plan(self, feeds: Mapping[str, Tensor]) -> ShapePlan:
        """What is left to do at the shape of `feeds`; captured when it is asked for again."""
        shape = _shape_of(feeds)
        plan = self._plans.get(shape)
        if plan is None:
            plan = self._planned(feeds)
            self._plans[shape] = plan
            while len(self._plans) > MOST_SHAPES:
                self._plans.popitem(last=False)
        elif plan.captured is None and not plan.refused:
            self._capture(plan, feeds)
        self._plans.move_to_end(shape)
        return plan

    def step_by_step(self, feeds: Mapping[str, Tensor], around: Around) -> None:
        """Run once without a CUDA graph, each product inside ``around(name)``."""
        self._run_steps(self.plan(feeds), feeds, around)

    def _capture(self, plan: ShapePlan, feeds: Mapping[str, Tensor]) -> None:
        inputs = {name: tensor.clone() for name, tensor in feeds.items()}
        captured = self.kernels.capture(lambda: self._eager(plan, inputs))
        if captured is None:
            plan.refused = True
            notice(
                "a run of this engine cannot be captured in a CUDA graph here: it runs step by step, which is slower"
            )
        else:
            plan.captured = CapturedRun(inputs, *captured)

    def _eager(self, plan: ShapePlan, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run_steps(plan, feeds, None)

    def _run_steps(self, plan: ShapePlan, feeds: Mapping[str, Tensor], around: Around | None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = dict(feeds)
        for call in plan.calls:
            given = [values[value] if isinstance(value, str) else value for value in call.inputs]
            with around(call.product) if around is not None and call.product is not None else nullcontext():
                values.update(zip(call.outputs, call.function(*given), strict=True))
            for name in call.freed:
                values.pop(name, None)
        return {name: self._output(values, plan.constants, name) for name in self.program.outputs}

    def _output(self, values: Mapping[str, Tensor], constants: Mapping[str, Tensor], name: str) -> Tensor:
        return (values[name] if name in values else constants[name]).float()

    def _function(self, step: Step) -> Callable[..., tuple[Tensor, ...]]:
        """What a step does with its inputs."""
        if step.op == PRODUCT:
            node = str(step.attributes["product"])
            return lambda x: (self.products.run(node, x),)
        return lambda *given: compute(step.op, given, step.attributes)

    def _planned(self, feeds: Mapping[str, Tensor]) -> ShapePlan:
        """Run step by step; what depends on shapes alone is computed here and now."""
        values: dict[str, Tensor] = dict(feeds)
        host: dict[str, Tensor] = dict(self._constants)
        left: list[Bound] = []
        for step, freed in zip(self._steps, self._frees, strict=True):
            if step.op == "Shape":
                source = values.get(step.inputs[0], host.get(step.inputs[0]))
                assert source is not None
                host[step.outputs[0]] = _shape(source, step)
            elif step.op != PRODUCT and all(name in host or not name for name in step.inputs):
                host.update(zip(step.outputs, self._on_host(step, host), strict=True))
            else:
                inputs = tuple(self._bound(step, at, values, host) for at in range(len(step.inputs)))
                given = [values[value] if isinstance(value, str) else value for value in inputs]
                values.update(zip(step.outputs, self._function(step)(*given), strict=True))
                left.append((step, inputs))
            for name in freed:
                values.pop(name, None)
                if name not in self._constants:
                    host.pop(name, None)
        constants = {name: host[name].to(self.kernels.device) for name in self.program.outputs if name in host}
        return ShapePlan(self._calls(left), constants)

    def _calls(self, left: Sequence[Bound]) -> tuple[BoundCall, ...]:
        """The calls of steps that run on the device, those of `FUSED` in a row as one."""
        calls: list[BoundCall] = []
        for segment in _segments(left):
            first, inputs = segment[0]
            if first.op not in FUSED:
                product = str(first.attributes["product"]) if first.op == PRODUCT else None
                calls.append(BoundCall(self._function(first), inputs, first.outputs, (), product))
                continue
            own = {id(step) for step, _ in segment}
            others = (value for step, reads in left if id(step) not in own for value in reads)
            later = frozenset(value for value in others if isinstance(value, str)) | frozenset(self.program.outputs)
            run = fused_run(segment, later)
            if run.outputs:
                calls.append(BoundCall(self._fuser.function(run.form), run.arguments, run.outputs, ()))
        names = [[*call.outputs, *(value for value in call.inputs if isinstance(value, str))] for call in calls]
        freed = last_reads(names, self.program.outputs)
        return tuple(replace(call, freed=gone) for call, gone in zip(calls, freed, strict=True))

    def _bound(
        self, step: Step, at: int, values: Mapping[str, Tensor], host: Mapping[str, Tensor]
    ) -> str | Tensor | Numbers | None:
        name = step.inputs[at]
        if not name:
            return None
        if name in values:
            if at in HOST.get(step.op, ()) or step.op in _HOST_ALONE:
                raise EngineError(
                    f"a {step.op} of this graph depends on the values of its inputs, not on their shapes alone; "
                    "build it with another backend"
                )
            return name
        if at in HOST.get(step.op, ()):
            return _numbers(host[name])
        if name not in self._constants:
            return host[name].to(self.kernels.device)
        if name not in self._on_device:
            self._on_device[name] = host[name].to(self.kernels.device)
        return self._on_device[name]

    def _on_host(self, step: Step, host: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        given: list[Tensor | Numbers | None] = [
            None if not name else _numbers(host[name]) if at in HOST.get(step.op, ()) else host[name]
            for at, name in enumerate(step.inputs)
        ]
        return compute(step.op, given, step.attributes)

    def _without_constant_steps(self) -> tuple[Step, ...]:
        """The steps that depend on an input; what the others make becomes constants, once."""
        left = []
        for step in self.program.steps:
            if step.op not in (PRODUCT, "Shape") and all(name in self._constants or not name for name in step.inputs):
                self._constants.update(zip(step.outputs, self._on_host(step, self._constants), strict=True))
            else:
                left.append(step)
        read = {name for step in left for name in step.inputs} | set(self.program.outputs)
        self._constants = {name: tensor for name, tensor in self._constants.items() if name in read}
        return tuple(left)


def _shape_of(feeds: Mapping[str, Tensor] | Mapping[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(feeds[name].shape) for name in sorted(feeds))


def _shape(source: Tensor, step: Step) -> Tensor:
    import torch

    given = Inputs(step.op, (source,), step.attributes)
    start, end = given.whole("start", 0), given.whole("end", source.dim())
    return torch.tensor(tuple(source.shape)[start:end], dtype=torch.int64)


def _numbers(tensor: Tensor) -> Numbers:
    return tuple(int(value) for value in tensor.reshape(-1).tolist())


def last_reads(uses: Sequence[Sequence[str]], outputs: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """For each use of names those that are not used after it."""
    last = {name: at for at, names in enumerate(uses) for name in names if name}
    freed: list[list[str]] = [[] for _ in uses]
    for name, at in last.items():
        if name not in outputs:
            freed[at].append(name)
    return tuple(tuple(names) for names in freed)


def compiler(kernels: Kernels, *, fuse: bool) -> Compile:
    """What functions between products go through."""
    return kernels.compile if fuse else lambda function: function


def _segments(steps: Sequence[Bound]) -> list[list[Bound]]:
    """Steps of `FUSED` in a row together, all others alone."""
    segments: list[list[Bound]] = []
    for bound in steps:
        if segments and bound[0].op in FUSED and segments[-1][0][0].op in FUSED:
            segments[-1].append(bound)
        else:
            segments.append([bound])
    return segments
