"""Runs a `Program` on torch tensors. What depends on shapes alone is computed once for each shape, on the host; a CUDA
graph holds the rest.

The first run of a shape goes step by step and remembers what is left to do; the second one is captured. Shapes are kept
as long as `MOST_SHAPES` others have not come after them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.cusparselt.kernels import Kernels
from engines.cusparselt.operators import HOST, Numbers, compute
from engines.cusparselt.products import Products
from engines.cusparselt.program import PRODUCT, Program, Step
from nxm_export.errors import EngineError, notice

if TYPE_CHECKING:
    from torch import Tensor

MOST_SHAPES = 24
_HOST_ALONE = ("Range",)  # its size is what its inputs say
Around = Callable[[str], AbstractContextManager[object]]  # of a product, by its name: what a profiler sees it in


@dataclass(frozen=True)
class BoundStep:
    """A step that runs on the device: each input is a name, a constant, or numbers; `freed` is read no more after
    it."""

    step: Step
    inputs: tuple[str | Tensor | Numbers | None, ...]
    freed: tuple[str, ...]


@dataclass
class ShapePlan:
    """What is left to do at one shape; `constants` are outputs that depend on shapes alone."""

    steps: tuple[BoundStep, ...]
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
        self.program, self.kernels, self._fuse = program, kernels, fuse
        self.products = Products(program, tensors, kernels)
        own = {name for part in program.products.values() for name in (part.weight, part.alpha, part.bias)}
        self._constants = {name: tensor for name, tensor in tensors.items() if name not in own}
        self._steps = self._without_constant_steps()
        self._frees = _last_reads(self._steps, program.outputs)
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

    def is_captured(self, feeds: Mapping[str, Tensor]) -> bool:
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
        call = self._call(plan, inputs)
        captured = self.kernels.capture(call)
        if captured is None:
            plan.refused = True
            notice(
                "a run of this engine cannot be captured in a CUDA graph here: it runs step by step, which is slower"
            )
        else:
            plan.captured = CapturedRun(inputs, *captured)

    def _call(self, plan: ShapePlan, inputs: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        def call() -> dict[str, Tensor]:
            return self._eager(plan, inputs)

        if not self._fuse:
            return call
        import torch

        compiled: Callable[[], dict[str, Tensor]] = torch.compile(call, dynamic=False)
        compiled()  # compiling is nothing that a CUDA graph can hold
        return compiled

    def _eager(self, plan: ShapePlan, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run_steps(plan, feeds, None)

    def _run_steps(self, plan: ShapePlan, feeds: Mapping[str, Tensor], around: Around | None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = dict(feeds)
        for bound in plan.steps:
            given = [values[value] if isinstance(value, str) else value for value in bound.inputs]
            for name, made in zip(bound.step.outputs, self._computed(bound.step, given, around), strict=True):
                values[name] = made
            for name in bound.freed:
                values.pop(name, None)
        return {name: self._output(values, plan.constants, name) for name in self.program.outputs}

    def _output(self, values: Mapping[str, Tensor], constants: Mapping[str, Tensor], name: str) -> Tensor:
        return (values[name] if name in values else constants[name]).float()

    def _computed(
        self, step: Step, given: Sequence[Tensor | Numbers | None], around: Around | None
    ) -> tuple[Tensor, ...]:
        if step.op != PRODUCT:
            return compute(step.op, given, step.attributes)
        x, node = given[0], str(step.attributes["product"])
        assert x is not None
        assert not isinstance(x, tuple)
        with around(node) if around is not None else nullcontext():
            return (self.products.run(node, x),)

    def _planned(self, feeds: Mapping[str, Tensor]) -> ShapePlan:
        """Run step by step; what depends on shapes alone is computed here and now."""
        values: dict[str, Tensor] = dict(feeds)
        host: dict[str, Tensor] = dict(self._constants)
        left: list[tuple[Step, tuple[str | Tensor | Numbers | None, ...]]] = []
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
                values.update(zip(step.outputs, self._computed(step, given, None), strict=True))
                left.append((step, inputs))
            for name in freed:
                values.pop(name, None)
                if name not in self._constants:
                    host.pop(name, None)
        constants = {name: host[name].to(self.kernels.device) for name in self.program.outputs if name in host}
        reads = [
            Step(step.op, tuple(x for x in inputs if isinstance(x, str)), step.outputs, {}) for step, inputs in left
        ]
        frees = _last_reads(reads, self.program.outputs)
        steps = (BoundStep(step, inputs, freed) for (step, inputs), freed in zip(left, frees, strict=True))
        return ShapePlan(tuple(steps), constants)

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


def _shape_of(feeds: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(feeds[name].shape) for name in sorted(feeds))


def _shape(source: Tensor, step: Step) -> Tensor:
    import torch

    start, end = step.attributes.get("start", 0), step.attributes.get("end", source.dim())
    assert isinstance(start, int)
    assert isinstance(end, int)
    return torch.tensor(tuple(source.shape)[start:end], dtype=torch.int64)


def _numbers(tensor: Tensor) -> Numbers:
    return tuple(int(value) for value in tensor.reshape(-1).tolist())


def _last_reads(steps: Sequence[Step], outputs: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """For each step the names that nothing reads after it."""
    last = {name: at for at, step in enumerate(steps) for name in (*step.outputs, *step.inputs) if name}
    freed: list[list[str]] = [[] for _ in steps]
    for name, at in last.items():
        if name not in outputs:
            freed[at].append(name)
    return tuple(tuple(names) for names in freed)
