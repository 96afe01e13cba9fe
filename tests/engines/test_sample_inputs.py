"""Inputs are made up for engines of any shape and type, in the sizes that they have fixed, and every CPU backend
builds, times and chooses such engines."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engines.base import Binding, Closing, Engine, backend, require_feeds
from engines.benchmark import latency
from engines.benchmark.fastest_backend import SHAPES
from engines.benchmark.latency import BenchReport, bench
from engines.sample_inputs import nearest_shape, require_shape, sample_feeds, shape_at
from nxm_export.cli import main
from nxm_export.contract.choices import BENCH_SHAPES
from nxm_export.errors import EngineError, NxmError
from nxm_export.pipeline.engine_builds import build_engine, build_fastest
from nxm_export.pipeline.engine_timing import bench_engines
from tests.support.variants import variants

pytest.importorskip("openvino", reason="OpenVINO is not installed; pip install 'nxm-export[openvino]'")

TYPES = {"int32": TensorProto.INT32, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
FREE = Binding("input_ids", "int64", (-1, -1))


class Bound(Closing):
    """An engine of these inputs that is never run."""

    def __init__(self, inputs: Sequence[Binding]) -> None:
        self.bindings = tuple(inputs)
        self.outputs: tuple[str, ...] = ("y",)
        self.inputs = tuple(binding.name for binding in inputs)

    @property
    def input_bindings(self) -> tuple[Binding, ...]:
        return self.bindings


def save(file: Path, inputs: Sequence[Binding]) -> Path:
    """A graph that multiplies every input by a weight, or looks it up in a table where it is integers."""
    nodes, weights = [], []
    for at, binding in enumerate(inputs):
        if binding.dtype == "float32":
            width = binding.shape[-1]
            weights.append(numpy_helper.from_array(np.eye(width, 4, dtype=np.float32), f"w{at}"))
            nodes.append(helper.make_node("MatMul", [binding.name, f"w{at}"], [f"y{at}"]))
        else:
            table = np.arange(8, dtype=np.float32).reshape(2, 4)
            weights.append(numpy_helper.from_array(table, f"w{at}"))
            nodes.append(helper.make_node("Gather", [f"w{at}", binding.name], [f"y{at}"]))
    free = iter(range(99))
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(
                binding.name, TYPES[binding.dtype], [size if size >= 0 else f"n{next(free)}" for size in binding.shape]
            )
            for binding in inputs
        ],
        [helper.make_tensor_value_info(f"y{at}", TensorProto.FLOAT, None) for at in range(len(inputs))],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    return file


STATIC = (Binding("input_ids", "int64", (1, 6)), Binding("attention_mask", "int64", (1, 6)))
INT32 = (Binding("input_ids", "int32", (-1, -1)), Binding("attention_mask", "int32", (-1, -1)))
ROWS = (Binding("x", "float32", (-1, 5)),)
HIDDEN = (Binding("x", "float32", (-1, -1, 5)),)
FIXED = (Binding("x", "float32", (2, 3, 5)),)
IMAGE = (Binding("x", "float32", (-1, 2, 3, 5)),)


@pytest.mark.parametrize(
    ("inputs", "nearest"),
    [
        ((FREE,), (8, 128)),
        (STATIC, (1, 6)),
        (ROWS, (8, 5)),
        (HIDDEN, (8, 128)),
        (FIXED, (2, 3)),
        (IMAGE, (8, 2)),
        ((Binding("x", "float32", (7,)),), (7, 1)),
        ((Binding("x", "float32", ()),), (1, 1)),
        ((Binding("x", "float32", (1, -1)),), (1, 128)),
        ((Binding("x", "float32", (4, 2)), FREE), (8, 128)),
    ],
    ids=str,
)
def test_what_is_fixed_is_what_is_run(inputs: tuple[Binding, ...], nearest: tuple[int, int]) -> None:
    assert nearest_shape(inputs, 8, 128) == nearest
    require_shape(inputs, *nearest)
    if nearest != (8, 128):
        with pytest.raises(EngineError, match=f"does not take 8x128 .* give {nearest[0]}x{nearest[1]}"):
            require_shape(inputs, 8, 128)


def test_the_first_axis_is_the_batch_and_every_other_free_one_the_sequence() -> None:
    assert shape_at(Binding("x", "float32", (-1, 3, -1, -1, 5)), 2, 7) == (2, 3, 7, 7, 5)


def test_ids_stay_below_the_vocabulary_and_are_1_where_nobody_knows_it() -> None:
    ids = sample_feeds([FREE], 4, 50, 9)["input_ids"]
    assert (ids.min(), ids.max(), ids.dtype.name) == (5, 8, "int64")
    assert set(sample_feeds([FREE], 4, 50, None)["input_ids"].flat) == {1}


def test_a_type_without_values_is_named() -> None:
    with pytest.raises(EngineError, match=r"cannot make up values for the input words of string \(\?, 3\)"):
        sample_feeds([Binding("words", "string", (-1, 3))], 1, 1, None)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["int64", "int32", "float32", "float16", "float64", "bool", "int8"]),
            st.lists(st.sampled_from([-1, 1, 2, 5]), max_size=4),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_made_up_inputs_are_what_an_engine_of_any_one_input_takes(
    kinds: list[tuple[str, list[int]]], batch: int, sequence: int
) -> None:
    for dtype, sizes in kinds:
        engine = Bound([Binding("x", dtype, tuple(sizes))])
        require_feeds(engine, sample_feeds(engine.input_bindings, batch, sequence, 9))


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    variants(
        [
            (STATIC, {(1, 6)}),
            (INT32, set(BENCH_SHAPES)),
            (ROWS, {(1, 5), (8, 5)}),
            (HIDDEN, set(BENCH_SHAPES)),
            (FIXED, {(2, 3)}),
            (IMAGE, {(1, 2), (8, 2)}),
        ],
        lambda case: case[0] in (STATIC, INT32),
    ),
)
def test_every_cpu_backend_builds_and_times_it(
    inputs: tuple[Binding, ...], shapes: set[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "SETTLE_S", 0.0)  # no number counts here
    file = save(tmp_path / "model.onnx", inputs)
    engines = [tmp_path / name for name in ("ort", "openvino")]
    outputs = []
    for engine in engines:
        build_engine(file, engine, engine.name)
        with backend(engine.name).load(engine) as loaded:
            outputs.append(loaded.run(sample_feeds(inputs, *nearest_shape(inputs, 2, 3), 2)))
    for name, array in outputs[0].items():
        np.testing.assert_allclose(array, outputs[1][name], rtol=1e-6)
    report = bench_engines(engines, rounds=1)
    assert {(timing.batch, timing.sequence) for timing in report.timings} == shapes
    if shapes != set(BENCH_SHAPES):
        with pytest.raises(EngineError, match="the engine does not take 3x77"):
            bench_engines(engines, [(3, 77)], rounds=1)
    measured: list[tuple[int, int]] = []

    def measure(loaded: Mapping[str, Engine], requested: Sequence[tuple[int, int]]) -> BenchReport:
        measured.extend(requested)
        return bench(loaded, requested, rounds=1, vocabulary=None)

    assert build_fastest(file, tmp_path / "auto", measure=measure).passport.backend in ("ort", "openvino")
    assert set(measured) == (set(SHAPES) if shapes == set(BENCH_SHAPES) else shapes)


def test_ids_beyond_32_bits_are_refused_by_an_engine_that_has_no_more(tmp_path: Path) -> None:
    file = save(tmp_path / "model.onnx", INT32)
    for name in ("ort", "openvino"):
        build_engine(file, tmp_path / name, name)
        with backend(name).load(tmp_path / name) as engine:
            feeds = sample_feeds(INT32, 1, 4, None)
            assert engine.run(feeds)["y0"].shape == (1, 4, 4)
            with pytest.raises(EngineError, match="input_ids holds values beyond 32 bits"):
                engine.run({**feeds, "input_ids": feeds["input_ids"] + 2**32})


def test_an_engine_that_no_made_up_input_fits_is_built_and_not_chosen(tmp_path: Path) -> None:
    """Its rows are cut into sevens, and what is made up has 32 numbers."""
    sevens = numpy_helper.from_array(np.array([-1, 7], np.int64), "sevens")
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "sevens"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "k"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [sevens],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    for name in ("ort", "openvino"):
        build_engine(tmp_path / "m.onnx", tmp_path / name, name)
    with pytest.raises(EngineError, match="no backend can be timed with made-up inputs"):
        build_fastest(tmp_path / "m.onnx", tmp_path / "auto")
    result = CliRunner().invoke(main, ["bench", str(tmp_path / "ort"), "--rounds", "1"])
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert "ONNX Runtime failed" in result.output


def test_a_weight_without_a_row_builds_where_the_runtime_takes_it(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((0, 4), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 0])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    for name in ("ort", "openvino", "auto"):
        result = CliRunner().invoke(
            main, ["build", str(tmp_path / "m.onnx"), "--backend", name, "--out", str(tmp_path / name), "--json"]
        )
        assert result.exit_code in (0, 1), result.output
        assert isinstance(result.exception, SystemExit | None)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_an_input_of_no_elements_is_refused_by_openvino(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """In a process of its own: the library once died of a division by zero."""
    save(tmp_path / "m.onnx", [Binding("x", dtype, shape)])
    command = [sys.executable, "-m", "nxm_export", "build", str(tmp_path / "m.onnx"), "--backend", "openvino"]
    done = subprocess.run([*command, "--out", str(tmp_path / "e")], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "there is nothing to run" in done.stderr


@st.composite
def bindings(draw: st.DrawFn) -> list[Binding]:
    made = []
    for at in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(list(TYPES)))
        sizes = draw(st.lists(st.sampled_from([-1, 0, 1, 3]), max_size=3))
        made.append(Binding(f"x{at}", dtype, (*sizes, 5) if dtype == "float32" else tuple(sizes)))
    return made


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bindings())
def test_no_graph_of_any_inputs_is_more_than_an_error_in_one_line(inputs: list[Binding]) -> None:
    with TemporaryDirectory() as scratch:
        directory = Path(scratch)
        file = save(directory / "model.onnx", inputs)
        for name in ("ort", "openvino"):
            with contextlib.suppress(NxmError):
                build_engine(file, directory / name, name)
                bench_engines([directory / name], rounds=1)
        with contextlib.suppress(NxmError):
            json.dumps(build_fastest(file, directory / "auto").passport.to_dict())
