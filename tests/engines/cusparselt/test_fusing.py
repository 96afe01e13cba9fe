"""Steps between products as functions: the same numbers, one function for layers that look alike, and nothing kept too
long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from engines.cusparselt.executor import Executor
from engines.cusparselt.fusing import FUSED
from engines.cusparselt.lowering import lowered
from engines.cusparselt.operators import known
from engines.cusparselt.stand_in import IntegerReferenceKernels
from nxm_export.errors import EngineError, Notice
from nxm_export.graph.reading.graph_weights import load_graph
from tests.engines.cusparselt.machines import Compiling, Named
from tests.support import baked, onnx_text, tiny

UNARY = ("Relu", "Neg", "Tanh", "Identity", "Softmax", "Abs")  # Softmax is never fused: it parts what is
BINARY = ("Add", "Sub", "Max", "Mul")


@st.composite
def graphs(draw: st.DrawFn) -> str:
    """Twelve steps, each on one or two of the values before it, and two outputs."""
    names, body = ["x", "k"], ""
    for number in range(12):
        operator = draw(st.sampled_from(UNARY + BINARY))
        read = [draw(st.sampled_from(names[-4:] if number else names)) for _ in range(1 + (operator in BINARY))]
        names.append(f"v{number}")
        body += f"{names[-1]} = {operator}({', '.join(read)}) "
    other = draw(st.sampled_from(names[3:-1]))
    head = f"g (float[2,s,8] x) => (float[a,b,c] v11, float[d,e,f] {other})"
    return f"{head} <float[8] k = {{1,2,3,4,5,6,7,8}}> {{ {body} }}"


@settings(max_examples=25)
@given(text=graphs())
def test_any_row_of_steps_gives_what_onnx_runtime_gives(text: str) -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    model = onnx_text.model(text)
    made = lowered(model, "g")
    executor = Executor(made.program, made.tensors, IntegerReferenceKernels())
    given_x = {binding.name: torch.from_numpy(x) for binding in made.program.inputs}
    for _ in range(3):
        outputs = executor.run(given_x)
    for name, expected in onnx_text.run(onnx_text.model(text), {"x": x}).items():
        shape = np.broadcast_shapes(expected.shape, outputs[name].shape)
        np.testing.assert_allclose(
            np.broadcast_to(outputs[name].numpy(), shape), np.broadcast_to(expected, shape), rtol=2e-5, atol=2e-5
        )


def fused_and_plain(file: Path, kernels: Named) -> tuple[Executor, Executor]:
    made = lowered(load_graph(file), "g")
    plain = Executor(made.program, made.tensors, IntegerReferenceKernels())
    return Executor(made.program, made.tensors, kernels, fuse=True), plain


def run_both(fused: Executor, plain: Executor, shapes: Sequence[tuple[int, int]]) -> None:
    """The same numbers from both, at every shape."""
    import torch

    for batch, sequence in shapes:
        feeds = {name: torch.from_numpy(array) for name, array in baked.feeds("bert", batch, sequence).items()}
        with torch.no_grad():
            np.testing.assert_allclose(fused.run(feeds)["logits"], plain.run(feeds)["logits"], atol=1e-6)


def test_layers_that_look_alike_share_their_functions(tiny_graph: Callable[..., Path]) -> None:
    """The first layer reads the embeddings and the last writes for the head, so that they have some of their own; both
    need those for query, key, value, context and GELU. Another shape needs none."""
    kernels = Named()
    fused, plain = fused_and_plain(tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx", kernels)
    run_both(fused, plain, [(2, 9), (3, 17), (1, 1), (2, 9)])
    assert len(kernels.compiled) == len(set(kernels.compiled))
    functions = [name for name in kernels.compiled if name.startswith("nxm_fused")]
    calls = [call for plan in fused._plans.values() for call in plan.calls if call.product is None]
    per_layer = 5 + 2  # three DQ, context's Q, GELU's Q; residual, norm and Q twice
    assert len(functions) <= 10 < tiny.LAYERS * per_layer
    assert len(calls) > 3 * len(functions)


@pytest.mark.slow
def test_torch_traces_the_whole_of_every_function(tiny_graph: Callable[..., Path]) -> None:
    kernels = Compiling()
    fused, plain = fused_and_plain(tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx", kernels)
    run_both(fused, plain, [(2, 9), (3, 17)])
    assert kernels.compiled


def test_what_nothing_reads_any_more_is_let_go(tiny_graph: Callable[..., Path]) -> None:
    """Of every shape: all that is made is freed but the outputs, each at its last reader."""
    import torch

    plain, _ = fused_and_plain(tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx", Named())
    feeds = {name: torch.from_numpy(array) for name, array in baked.feeds("bert", 2, 9).items()}
    plan = plain.plan(feeds)
    freed = [name for call in plan.calls for name in call.freed]
    assert len(freed) == len(set(freed))
    assert set(freed) | {"logits"} == {name for call in plan.calls for name in call.outputs} | set(feeds)
    for at, call in enumerate(plan.calls):
        later = {value for other in plan.calls[at + 1 :] for value in other.inputs if isinstance(value, str)}
        assert not later & set(call.freed)


def test_what_torch_cannot_compile_runs_as_it_is_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from engines.cusparselt.kernels import CudaKernels

    def broken(function: object) -> Callable[..., object]:
        def call(*_: object) -> object:
            raise RuntimeError("Cannot find a working triton installation\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    kernels = CudaKernels()
    one, two = (kernels.compile(lambda x: (x + 1,)), kernels.compile(lambda x: (x * 2,)))
    with pytest.warns(Notice, match=r"torch cannot compile .* triton installation\); --no-fuse") as told:
        made = [function(torch.ones(1))[0].item() for function in (one, one, two)]
    assert made == [2.0, 2.0, 2.0]
    assert len(told) == 1
    monkeypatch.setattr(torch, "compile", lambda f: lambda *_: (_ for _ in ()).throw(RuntimeError("illegal memory")))
    with pytest.raises(EngineError, match="the GPU stopped"):
        kernels.compile(lambda x: (x,))(torch.ones(1))


def test_every_operator_that_is_fused_is_known() -> None:
    assert all(known(name) for name in FUSED)
