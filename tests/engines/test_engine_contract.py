"""What every runtime promises, tried on every runtime of `BACKENDS` and on the PyTorch reference; what is not here is
skipped with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import (
    BACKENDS,
    BuildOptions,
    Engine,
    LoadOptions,
    backend,
    cpu_backends,
)
from engines.ort import backend as ort_backend
from engines.passport import load_passport
from engines.reference import pytorch
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.storage.hashing import file_hash
from tests.support import baked, onnx_text, tiny
from tests.support.variants import variants

RUNTIMES = [*BACKENDS, "torch_eager"]
TOO_LONG = f"a sequence of {tiny.POSITIONS + 1} tokens is longer than the model's {tiny.POSITIONS}"


def open_engine(name: str, tiny_engine: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> Engine:
    try:
        if name == "torch_eager":
            return pytorch.load(tiny_checkpoint("bert"), task="classification")
        return backend(name).load(tiny_engine(name))
    except EngineUnavailable as error:
        pytest.skip(f"{name}: {error}")


@pytest.fixture(scope="module", params=RUNTIMES)
def engine(
    request: pytest.FixtureRequest, tiny_engine: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> Iterator[Engine]:
    with open_engine(request.param, tiny_engine, tiny_checkpoint) as loaded:
        yield loaded


class TestRun:
    def test_inputs_and_outputs_have_the_names_of_the_family(self, engine: Engine) -> None:
        assert engine.inputs == FAMILIES["bert"].inputs
        assert engine.outputs == ("logits",)

    @pytest.mark.parametrize(("batch", "sequence", "padding"), [(1, 1, 0), (5, 7, 3), (2, tiny.POSITIONS, 0)])
    def test_outputs_are_float32_and_the_callers_own(
        self, engine: Engine, batch: int, sequence: int, padding: int
    ) -> None:
        feeds = baked.feeds("bert", batch, sequence, padding=padding)
        before = {name: array.copy() for name, array in feeds.items()}
        first = engine.run(feeds)["logits"]
        assert first.shape == (batch, 2)
        assert first.dtype == np.float32
        assert first.flags.writeable
        before_second_run = first.copy()
        second = engine.run(feeds)["logits"]
        second += 1.0
        np.testing.assert_array_equal(first, before_second_run)
        np.testing.assert_array_equal(
            engine.run(feeds)["logits"], before_second_run
        )  # the same input gives the same output
        for name, array in feeds.items():
            np.testing.assert_array_equal(array, before[name])

    def test_padding_does_not_reach_the_result(self, engine: Engine) -> None:
        short = baked.feeds("bert", 2, 6)
        long = {name: np.pad(array, ((0, 0), (0, 5))) for name, array in short.items()}
        # Sums over more terms round differently, and one code that moves by a step changes these logits by some 0.05.
        np.testing.assert_allclose(engine.run(long)["logits"], engine.run(short)["logits"], atol=0.1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda feeds: feeds.pop("attention_mask"),
                "the engine takes input_ids, attention_mask, token_type_ids; got",
            ),
            (lambda feeds: feeds.update(extra=feeds["input_ids"]), "the engine takes input_ids"),
            (lambda feeds: feeds.clear(), "got nothing"),
            (
                lambda feeds: feeds.update(input_ids=feeds["input_ids"].astype(np.int32)),
                "inputs must be int64; input_ids is int32",
            ),
            (lambda feeds: feeds.update(input_ids=feeds["input_ids"][:1]), "inputs must share one non-empty shape"),
            (
                lambda feeds: feeds.update({name: array[:0] for name, array in feeds.items()}),
                "inputs must share one non-empty shape",
            ),
            (
                lambda feeds: feeds.update({name: array[0] for name, array in feeds.items()}),
                "inputs must share one non-empty shape",
            ),
            (lambda feeds: feeds.update(baked.feeds("bert", 1, tiny.POSITIONS + 1)), TOO_LONG),
            (
                lambda feeds: feeds.update(input_ids=feeds["input_ids"] + 1000),
                "input_ids holds 10.. to 10.., and the model takes 0 to 35",
            ),
            (lambda feeds: feeds.update(input_ids=feeds["input_ids"] - 1000), "input_ids holds -"),
            (lambda feeds: feeds.update(token_type_ids=feeds["token_type_ids"] + 2), "token_type_ids holds 2 to 2"),
        ],
    )
    def test_what_the_model_has_no_answer_for_is_refused(
        self, engine: Engine, change: Callable[[dict[str, Any]], Any], message: str
    ) -> None:
        feeds = baked.feeds("bert", 2, 5)
        change(feeds)
        with pytest.raises(EngineError, match=message):
            engine.run(feeds)

    @pytest.mark.parametrize("name", RUNTIMES)
    def test_a_closed_engine_says_so(
        self, name: str, tiny_engine: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
    ) -> None:
        with open_engine(name, tiny_engine, tiny_checkpoint) as engine:
            engine.run(baked.feeds("bert", 1, 3))
        engine.close()
        with pytest.raises(EngineError, match="was closed"):
            engine.run(baked.feeds("bert", 1, 3))


class TestDirectory:
    def test_it_holds_what_a_host_needs_and_a_passport_that_says_what_made_it(
        self, directory: Path, tiny_graph: Callable[..., Path]
    ) -> None:
        passport = load_passport(directory)
        files = {path.name for path in directory.iterdir()} - {"build.log"}
        capabilities = backend(passport.backend).CAPABILITIES
        if capabilities.sparse_kernels:
            files.remove("weights.json")  # the sparsity report's facts of every weight
        assert files == {passport.engine, "passport.json", "spec.json", "tokenizer.json", "origin.json"}
        graph = tiny_graph("bert", "inputs-outputs", "cpu" if capabilities.device == "cpu" else "trt") / "model.onnx"
        assert passport.onnx_sha256 == file_hash(graph)
        assert passport.engine_sha256 == file_hash(directory / passport.engine)
        assert bool(passport.profiles) == capabilities.optimization_profiles
        assert passport.graph["task"] == "classification"
        assert passport.graph["placement"] == "inputs-outputs"
        assert passport.plan is not None
        assert passport.plan.options == {"2:4+W8": 12}
        assert load_spec(directory) == load_spec(graph.parent)
        assert "nxm" in passport.rebuild_command()

    def test_inspection_tells_how_many_products_run_on_integers(self, directory: Path) -> None:
        name = load_passport(directory).backend
        facts = backend(name).inspect(directory)
        assert facts.backend == name
        assert facts.to_dict()["integer_products"] == 12
        json.dumps(facts.to_dict())

    def test_it_works_when_copied_alone(self, copy: Path) -> None:
        load_tokenizer(copy)
        name = load_passport(copy).backend
        try:
            with backend(name).load(copy) as engine:
                assert engine.run(baked.feeds("bert", 1, 4))["logits"].shape == (1, 2)
        except EngineUnavailable as error:
            pytest.skip(f"built, not run: {error}")

    def test_it_loads_without_torch_and_transformers(self, copy: Path) -> None:
        """In a process that could not import them, from a directory that has folders named like our packages."""
        code = f"""
import sys
for name in ("torch", "transformers", "sklearn", "scipy", "onnxscript"):
    sys.modules[name] = None
import numpy as np
from engines.base import backend
from engines.passport import load_passport
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples, encode
from nxm_export.data.features import pad
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.errors import EngineUnavailable
from nxm_export.contract.io_spec import load_spec
here = {str(copy)!r}
spec = load_spec(here)
from pathlib import Path
features = encode(load_tokenizer(Path(here)), Examples(["a good film"], None, [0], "x"), spec.max_length, spec.inputs)
try:
    with backend(load_passport(here).backend).load(here) as engine:
        print("ran", engine.run(pad(features, spec.pad_id))["logits"].shape)
except EngineUnavailable as error:
    print("skip", error)
"""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        if done.stdout.startswith("skip"):
            pytest.skip(done.stdout.strip())
        assert done.stdout == "ran (1, 2)\n", done.stderr


@pytest.mark.parametrize("family", variants(FAMILIES, ("bert",), slow=tiny.DISTINCT))
def test_tensorrt_rtx_builds_every_family_with_all_products_in_int8(
    family: str, tiny_engine: Callable[..., Path]
) -> None:
    """A real engine, built ahead of time without a GPU; the builder's own layer list says what runs on integers."""
    try:
        directory = tiny_engine("trt_rtx", family)
    except EngineUnavailable as error:
        pytest.skip(str(error))
    passport = load_passport(directory)
    assert (directory / "model.engine").stat().st_size > 100_000
    planned = tiny.matrices(family, 1, split=True) * tiny.LAYERS  # each run of a shared block by itself
    assert passport.options["float_products"] == []
    assert passport.options["planned_products"] == passport.options["integer_products"] == planned
    assert passport.profiles[0].maximum == (32, tiny.POSITIONS)


@pytest.mark.parametrize("family", variants(FAMILIES, ("bert",), slow=tiny.DISTINCT))
@pytest.mark.parametrize("placement", ["inputs", "inputs-outputs"])
@pytest.mark.parametrize("name", cpu_backends())
def test_every_planned_product_runs_on_integers(
    name: str, family: str, placement: str, tiny_engine: Callable[..., Path]
) -> None:
    try:
        facts = backend(name).inspect(tiny_engine(name, family, placement)).to_dict()
    except EngineUnavailable as error:
        pytest.skip(str(error))
    split = placement == "inputs-outputs"  # a part has an output quantizer of its own
    assert facts["integer_products"] == tiny.matrices(family, 1, split=split) * tiny.LAYERS, facts["operators"]


class TestForeign:
    TEXT = "g (float[batch, 4] x) => (float[batch, 2] y) <float[4, 2] w = {1,0,0,1,1,0,0,2}> { y = MatMul(x, w) }"

    def test_any_onnx_file_is_built_and_inspected(self, tmp_path: Path) -> None:
        build_engine(onnx_text.save(self.TEXT, tmp_path / "foreign.onnx"), tmp_path / "engine")
        assert {path.name for path in (tmp_path / "engine").iterdir()} == {"model.onnx", "passport.json"}
        assert backend("ort").inspect(tmp_path / "engine").to_dict()["integer_products"] == 0
        with backend("ort").load(tmp_path / "engine") as engine:
            assert engine.run({"x": np.ones((1, 4), np.float32)})
            with pytest.raises(EngineError, match=r"takes x of float32 \(\?, 4\); got int64 of shape \(1, 4\)"):
                engine.run({"x": np.ones((1, 4), np.int64)})
            with pytest.raises(EngineError, match=r"got float32 of shape \(1, 5\)"):
                engine.run({"x": np.ones((1, 5), np.float32)})

    @pytest.mark.parametrize("name", BACKENDS)
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("g (float[b, 4] x) => (float[b, 4] y) { y = NoSuchOperator(x) }", "NoSuchOperator"),
            ("g (float[b, 4] x) => (float[b, 4] y) { y = MatMul(x, missing) }", ""),
        ],
    )
    def test_a_graph_that_the_runtime_refuses_gives_its_own_words_and_no_directory(
        self, tmp_path: Path, name: str, text: str, message: str
    ) -> None:
        file = onnx_text.save(text, tmp_path / "broken.onnx")
        with pytest.raises((EngineError, ArtifactError)) as caught:
            build_engine(file, tmp_path / "engine", name)
        if isinstance(caught.value, EngineUnavailable):
            pytest.skip(str(caught.value))
        assert message in str(caught.value)
        log = f"(log: {tmp_path / 'engine.build.log'})"  # of TensorRT's builders
        kept = ["engine.build.log"] if log in str(caught.value) else []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx", *kept]


def test_a_runtime_that_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tiny_engine: Callable[..., Path]
) -> None:
    path = tiny_engine("ort")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'nxm-export\[ort\]'"):
        backend("ort").load(path)


@pytest.mark.parametrize(
    ("name", "module", "called"), [("ort", "onnxruntime", "ONNX Runtime"), ("openvino", "openvino", "OpenVINO")]
)
def test_a_runtime_that_cannot_be_loaded_is_not_called_one_that_is_not_installed(
    name: str,
    module: str,
    called: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_engine: Callable[..., Path],
) -> None:
    """As where a library of the system is missing, or memory to map the runtime's own."""
    path = tiny_engine(name)
    (tmp_path / f"{module}.py").write_text("raise ImportError('libx.so: failed to map segment')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(EngineUnavailable, match=rf"{called} is installed and cannot be loaded \(libx\.so: failed"):
        backend(name).load(path)


def test_threads_are_recorded_and_used(tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
    (tmp_path / "engine").mkdir()
    passport = ort_backend.build(tiny_graph() / "model.onnx", tmp_path / "engine", BuildOptions(threads=1))
    assert passport.threads == 1
    for options, expected in ((LoadOptions(), 1), (LoadOptions(threads=2), 2)):
        with ort_backend.load(tmp_path / "engine", options) as engine:
            session: Any = engine._session
            assert session.get_session_options().intra_op_num_threads == expected
