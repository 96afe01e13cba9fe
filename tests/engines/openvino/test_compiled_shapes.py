"""An engine with shapes known ahead gives the free model's answers, from models that were compiled for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from engines.base import BuildOptions, Engine, LoadOptions, backend
from engines.openvino import backend as openvino_backend
from engines.openvino.backend import OpenVinoEngine
from engines.parallel_runs import run_batches
from engines.parity.compare import compare
from engines.passport import load_passport
from engines.serving.batching import QueuedRequest, run_batch
from engines.serving.model import open_model
from engines.serving.settings import ModelOptions
from nxm_export.cli import main
from nxm_export.data.columns import Columns
from nxm_export.errors import ArtifactError, EngineError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.labelled_texts import features_of
from tests.support import baked, onnx_text
from tests.support.tiny import FAMILIES
from tests.support.variants import variants

pytest.importorskip("openvino", reason="OpenVINO is not installed; pip install 'nxm-export[openvino]'")

SHAPES = ((1, 16), (4, 12))


@pytest.fixture(scope="module")
def compiled(tiny_graph: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory with `SHAPES`; read it only."""
    out = tmp_path_factory.mktemp("compiled") / "engine"
    build_engine(tiny_graph("bert", "inputs") / "model.onnx", out, "openvino", BuildOptions(threads=1, shapes=SHAPES))
    return out


@pytest.fixture(scope="module")
def pair(compiled: Path, tiny_engine: Callable[..., Path]) -> Iterator[tuple[Any, Engine]]:
    """The engine with compiled shapes, and the same without."""
    plain = tiny_engine("openvino", "bert", "inputs")
    with backend("openvino").load(compiled) as ours, backend("openvino").load(plain) as free:
        yield ours, free


@pytest.mark.parametrize(
    ("rows", "length", "shape"),
    [
        (1, 16, (1, 16)),
        (1, 9, (1, 16)),  # 7 tokens are added
        (1, 7, None),  # 9 would be
        (4, 12, (4, 12)),
        (4, 11, (4, 12)),
        (3, 12, None),  # a row of 12 would be added
        (5, 12, None),
        (1, 17, None),
    ],
)
def test_answers_are_those_of_the_free_model(
    rows: int, length: int, shape: tuple[int, int] | None, pair: tuple[Any, Engine]
) -> None:
    ours, free = pair
    feeds = baked.feeds("bert", rows, length, padding=2)
    assert ours.compiled_shape(feeds) == shape
    actual = ours.run(feeds)["logits"]
    assert actual.shape == (rows, 2)
    # The same kernels in another order of summation; a code that moves by one step changes these logits by some 0.05.
    np.testing.assert_allclose(actual, free.run(feeds)["logits"], atol=0.1)


def test_a_compiled_shape_is_run_by_its_own_model(compiled: Path) -> None:
    """Each model's runs are counted: a fall-back to the free one would show in no answer."""
    ran: list[str] = []

    class Counted:
        def __init__(self, name: str, requests: Any) -> None:
            self.name, self.requests = name, requests

        def free(self) -> Any:
            ran.append(self.name)
            return self.requests.free()

    engine: Any = openvino_backend.load(compiled)
    with engine:
        engine._requests = Counted("free", engine._requests)
        engine._compiled = {shape: Counted(str(shape), requests) for shape, requests in engine._compiled.items()}
        for shape in ((1, 16), (2, 16), (4, 12), (1, 14)):
            engine.run(baked.feeds("bert", *shape))
    assert ran == ["(1, 16)", "free", "(4, 12)", "(1, 16)"]
    with pytest.raises(EngineError, match="was closed"):
        engine.run(baked.feeds("bert", 1, 16))


def test_compiled_shapes_run_several_batches_at_once(compiled: Path) -> None:
    feeds = [baked.feeds("bert", *shape, seed=seed) for seed, shape in enumerate([(1, 16), (4, 12), (2, 9)] * 4)]
    with openvino_backend.load(compiled, LoadOptions(2, "throughput")) as engine:
        alone = [engine.run(each)["logits"] for each in feeds]
        together = [made["logits"] for _, made in run_batches(engine, feeds, lambda each: each, lambda _: 16)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_compiled_shape_is_counted_with_what_runs_in_it(compiled: Path) -> None:
    """All planned products run on integers at fixed sizes, too, in fewer layers: the guard of what shapes are for."""
    passport = load_passport(compiled)
    assert passport.shapes == SHAPES
    assert (passport.options["integer_products"], passport.options["float_products"]) == (12, [])
    assert "--shape 1x16 --shape 4x12" in passport.rebuild_command()
    facts = openvino_backend.inspect(compiled)
    assert [(shape.batch, shape.sequence, shape.integer_products) for shape in facts.shapes] == [
        (1, 16, 12),
        (4, 12, 12),
    ]
    assert all(0 < shape.layers < 0.9 * sum(facts.operators.values()) for shape in facts.shapes)
    json.dumps(facts.to_dict())


def test_a_product_that_one_compiled_shape_runs_in_float_is_named() -> None:
    def product(name: str, precision: str) -> openvino_backend.MatrixProduct:
        return openvino_backend.MatrixProduct(name, precision, "")

    models = [[product("a/x", "i8"), product("b", "u8")], [product("a", "f32"), product("b", "i8")]]
    assert openvino_backend._split(["a.weight", "b.weight"], models) == (["b.weight"], ["a.weight"])


def test_memory_is_said_before_a_build_and_looked_for_before_a_load(
    compiled: Path, tiny_graph: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    total = load_passport(compiled).whole_option("shapes_bytes")
    assert total is not None
    assert 2 * 14e6 < total < 2 * 16e6  # kernels, and next to no weights
    monkeypatch.setattr("nxm_export.storage.memory.available_memory", lambda: 10**7)
    with pytest.raises(EngineError, match=r"loading it with its 2 compiled shapes needs at least 0\.0 GB"):
        openvino_backend.load(compiled)
    with pytest.raises(EngineError, match=r"compiling 2 shapes needs at least .* give fewer of --shape"):
        openvino_backend.build(tiny_graph("bert", "inputs") / "model.onnx", tmp_path, BuildOptions(shapes=SHAPES))


@pytest.mark.parametrize("shapes", [[[1, 0]], [[1, 8]] * 17, [[1, 2**40]], [[1, 2, 3]], "1x8", [1, 8]])
def test_a_passport_of_impossible_shapes_is_refused(shapes: object, compiled: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(compiled, tmp_path / "copy")
    passport = load_passport(copy)
    replace(passport, options={**passport.options, "shapes": shapes}).save(copy)
    with pytest.raises(ArtifactError, match=r"passport\.json: options.*shapes.*build the engine again"):
        load_passport(copy)


def test_a_passport_of_a_shape_that_the_model_does_not_take_is_no_traceback(compiled: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(compiled, tmp_path / "copy")
    passport = load_passport(copy)
    replace(passport, options={**passport.options, "shapes": [[1, 4000]]}).save(copy)
    with pytest.raises(EngineError, match="cannot load it for the shape 1x4000"):
        openvino_backend.load(copy)


def test_a_passport_of_before_has_no_shapes(tiny_engine: Callable[..., Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_engine("openvino", "bert", "inputs"), tmp_path / "copy")
    passport = load_passport(copy)
    options = {key: value for key, value in passport.options.items() if not key.startswith("shapes")}
    replace(passport, options=options).save(copy)
    assert load_passport(copy).shapes == ()
    with backend("openvino").load(copy) as engine:
        assert engine.run(baked.feeds("bert", 1, 4))["logits"].shape == (1, 2)


def test_a_comparison_holds_every_compiled_shape_against_another_model(
    compiled: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(compiled, tmp_path / "copy")  # the report is written beside it
    checkpoint = tiny_checkpoint("bert")
    report = compare(checkpoint, copy, features_of(copy, str(checkpoint.parent / "dev.tsv"), Columns()))
    verdicts = {probe.name: probe.passed for probe in report.probes}
    assert (verdicts["compiled shape 1x16"], verdicts["compiled shape 4x12"]) == (True, True)
    assert report.passed


def test_a_server_warms_compiled_shapes_up_and_answers_through_them(compiled: Path) -> None:
    ran: list[tuple[int, int] | None] = []
    run = OpenVinoEngine.run

    def recorded(engine: OpenVinoEngine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ran.append(engine.compiled_shape(feeds))
        return run(engine, feeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVinoEngine, "run", recorded)
        model = open_model("m", "1", compiled, ModelOptions(instances=1))
        assert set(SHAPES) <= set(ran)
        ran.clear()
        request = QueuedRequest(baked.feeds("bert", 1, 14), float("inf"))
        bucket = model.buckets.buckets[model.buckets.index(1, 14)]
        assert run_batch(model._engines[0], bucket, [request], model._pads, {}) == (1, 16)  # as it computes them
        assert ran == [(1, 16)]
        assert request.outputs["logits"].shape == (1, 2)
        model.close()


def test_the_command_takes_shapes_from_the_lengths_of_data(tiny_graph: Callable[..., Path], tmp_path: Path) -> None:
    graph, data = tiny_graph("bert", "inputs"), tmp_path / "train.tsv"
    data.write_text("sentence\tlabel\n" + 20 * "a good film\t1\n" + 16 * "bad " + "\t0\n")
    out = tmp_path / "engine"
    asked = ["--backend", "openvino", "--lengths", str(data), "--max-profiles", "1", "--shape", "2x8"]
    done = CliRunner().invoke(main, ["build", str(graph), "--out", str(out), *asked])
    assert done.exit_code == 0, done.output
    assert load_passport(out).shapes == ((2, 8), (1, 8))  # five tokens; a longer shape would run no more of them
    assert "compiled shapes add about" in done.stderr
    shown = CliRunner().invoke(main, ["inspect", str(out), "--json"])
    assert [shape["sequence"] for shape in json.loads(shown.stdout)["shapes"]] == [8, 8]


def test_a_graph_of_other_inputs_runs_a_shape_of_just_its_sizes(tmp_path: Path) -> None:
    graph = "g (float[n, 4] x, float[n, t] m) => (float[n, t] y, float[n, 4] z) { y = Neg(m) z = Neg(x) }"
    file = onnx_text.save(graph, tmp_path / "model.onnx", opset=20)
    build_engine(file, tmp_path / "engine", "openvino", BuildOptions(shapes=[(2, 5)]))
    with openvino_backend.load(tmp_path / "engine") as engine:
        for shape, expected in (((2, 5), (2, 5)), ((2, 4), None), ((1, 5), None)):
            feeds = {"x": np.ones((shape[0], 4), np.float32), "m": np.full(shape, 2, np.float32)}
            assert engine.compiled_shape(feeds) == expected
            outputs = engine.run(feeds)
            np.testing.assert_array_equal(outputs["y"], np.full(shape, -2))
            np.testing.assert_array_equal(outputs["z"], -feeds["x"])


def test_a_graph_of_fixed_sizes_is_compiled_as_it_stands(tmp_path: Path) -> None:
    file = onnx_text.save("g (float[2, 4] x) => (float[2, 4] y) { y = Neg(x) }", tmp_path / "model.onnx", opset=20)
    assert build_engine(file, tmp_path / "engine", "openvino", BuildOptions(shapes=[(2, 4)])).shapes == ()
    with pytest.raises(EngineError, match="does not take 1x4"):
        build_engine(file, tmp_path / "other", "openvino", BuildOptions(shapes=[(1, 4)]))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", variants(FAMILIES, (), ("modernbert",)))
def test_padded_answers_of_every_family_are_those_of_the_free_model(family: str, tmp_path: Path) -> None:
    """Positions, windows and masks of each family, with padding that nobody asked for."""
    graph = export(baked.write_checkpoint(family, tmp_path / "checkpoint"), tmp_path / "graph").path
    ours = build_engine(graph, tmp_path / "ours", "openvino", BuildOptions(threads=1, shapes=[(3, 16)]))
    free = build_engine(graph, tmp_path / "free", "openvino", BuildOptions(threads=1))
    names = ("planned_products", "integer_products", "float_products")
    assert [ours.options[name] for name in names] == [free.options[name] for name in names]
    feeds = baked.feeds(family, 3, 14, padding=3)
    with openvino_backend.load(tmp_path / "ours") as engine, openvino_backend.load(tmp_path / "free") as other:
        assert engine.compiled_shape(feeds) == (3, 16)
        # Codes may move by a step.
        np.testing.assert_allclose(engine.run(feeds)["logits"], other.run(feeds)["logits"], atol=0.1)
