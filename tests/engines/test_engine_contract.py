"""What every runtime promises, tried on every runtime of `BACKENDS` and on the PyTorch reference; what is not here is
skipped with its reason."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from engines.base import (
    BACKENDS,
    Backend,
    BuildOptions,
    Engine,
    LayerTimedEngine,
    LoadOptions,
    Profile,
    backend,
    cpu_backends,
    module_command,
)
from engines.openvino import backend as openvino_backend
from engines.ort import backend as ort_backend
from engines.passport import load_passport
from engines.reference import pytorch
from engines.tensorrt import backend as tensorrt_backend
from engines.tensorrt import rtx_backend
from engines.tensorrt.runtime import TensorRTEngine
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.examples import load_tokenizer
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.pipeline.engine_commands import build_engine
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import as_object
from tests.support import baked, onnx_text, tiny
from tests.support.records import PASSPORT
from tests.support.variants import variants

RUNTIMES = [*BACKENDS, "torch_eager"]
TOO_LONG = f"a sequence of {tiny.POSITIONS + 1} tokens is longer than the model's {tiny.POSITIONS}"
BAD_PROFILE = {"minimum": [1, 1], "optimum": [1, 8], "maximum": [1]}
FALLING_PROFILE = {"minimum": [4, 4], "optimum": [2, 2], "maximum": [8, 8]}
BAD_BINDING = {"name": "x", "dtype": "int64", "shape": "all"}

if TYPE_CHECKING:  # what `backend` promises of the modules of `BACKENDS`, held by mypy
    _MODULES: tuple[Backend, ...] = (ort_backend, openvino_backend, tensorrt_backend, rtx_backend)


def nested(depth: int) -> Any:
    return {"deeper": nested(depth - 1)} if depth else {}


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


@pytest.fixture(scope="module", params=BACKENDS)
def directory(request: pytest.FixtureRequest, tiny_engine: Callable[..., Path]) -> Path:
    """An engine directory of each backend that can build here; read it only."""
    try:
        return tiny_engine(request.param)
    except EngineUnavailable as error:
        pytest.skip(f"{request.param}: {error}")


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(directory, tmp_path / "copied alone")


class TestProtocol:
    def test_mypy_holds_every_backend_against_the_protocol(self) -> None:
        modules = (ort_backend, openvino_backend, tensorrt_backend, rtx_backend)
        assert {module.NAME: module.__name__ for module in modules} == BACKENDS

    @pytest.mark.parametrize("name", BACKENDS)
    def test_a_module_has_the_three_functions_with_the_parameters_of_the_protocol(self, name: str) -> None:
        for function in ("build", "load", "inspect"):
            expected = list(inspect.signature(getattr(Backend, function)).parameters)[1:]  # without self
            assert list(inspect.signature(getattr(backend(name), function)).parameters) == expected

    def test_capabilities_say_where_a_backend_runs_and_what_it_times(self) -> None:
        assert cpu_backends() == ("ort", "openvino")
        for name in BACKENDS:
            capabilities = backend(name).CAPABILITIES
            on_cpu = name in cpu_backends()
            assert capabilities.threads == capabilities.runs_onnx == on_cpu
            assert capabilities.layer_times == capabilities.sparse_kernels == (not on_cpu)
        assert issubclass(TensorRTEngine, LayerTimedEngine)
        assert not issubclass(ort_backend.OrtEngine, LayerTimedEngine)


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
from nxm_export.data.examples import Columns, Examples, encode, load_tokenizer, pad
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


class TestTampering:
    def load(self, path: Path) -> None:
        backend(load_passport(path).backend).load(path)

    @pytest.mark.parametrize("at", [0, 0.5, 1])
    def test_one_flipped_byte_is_found(self, copy: Path, at: float) -> None:
        file = copy / load_passport(copy).engine
        data = bytearray(file.read_bytes())
        data[min(int(at * len(data)), len(data) - 1)] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"is not the engine of its passport .* build it again"):
            self.load(copy)

    def test_another_models_engine_is_found(self, copy: Path, tiny_engine: Callable[..., Path]) -> None:
        passport = load_passport(copy)
        other = tiny_engine(passport.backend, "bert", "inputs")
        shutil.copy(other / passport.engine, copy / passport.engine)
        with pytest.raises(ArtifactError, match="is not the engine of its passport"):
            self.load(copy)

    def test_a_missing_engine_is_named(self, copy: Path) -> None:
        (copy / load_passport(copy).engine).unlink()
        with pytest.raises(ArtifactError, match="is missing"):
            self.load(copy)

    def test_a_missing_tokenizer_is_named_where_it_is_needed(self, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing; copy it from the model"):
            load_tokenizer(copy)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "has no passport.json: it is not an engine directory; make one with `nxm build`"),
            ("{", "passport.json: not valid JSON"),
            ("[]", "not a nxm-passport/2 file"),
            (
                '{"schema": "nxm-passport/2"}',
                "passport.json: Object missing required field `backend`; build the engine again",
            ),
            ('{"schema": "nxm-passport/1"}', "passport.json: malformed nxm-passport/1 file"),
            (
                lambda data: {**data, "schema": "nxm-passport/9"},
                "schema nxm-passport/9 is not the nxm-passport/2 that this version reads",
            ),
            (lambda data: {**data, "colour": "red"}, "passport.json: unknown field colour"),
            (
                lambda data: {**data, "plan": {**data["plan"], "colour": "red"}},
                "passport.json: unknown field plan.colour",
            ),
            (lambda data: {**data, "engine": 5}, "passport.json: engine: Expected `str`, got `int`"),
            (lambda data: {**data, "requires": []}, "passport.json: requires: Expected `object`, got `array`"),
            (
                lambda data: {**data, "plan": {**data["plan"], "compression": {"hw": float("nan")}}},
                "passport.json: not valid JSON (NaN is not a JSON number)",
            ),
            (
                lambda data: {**data, "options": {"auto": nested(100)}},
                "passport.json: not valid JSON (nested more than 64 deep)",
            ),
            (
                lambda data: {**data, "profiles": [BAD_PROFILE]},
                "passport.json: profiles[0].maximum: Expected `array` of length 2, got 1",
            ),
            (lambda data: {**data, "profiles": [FALLING_PROFILE]}, "passport.json: profile sizes must rise from 1"),
            (
                lambda data: {**data, "bindings": {"inputs": [BAD_BINDING]}},
                "passport.json: bindings.inputs[0].shape: Expected `array`, got `str`",
            ),
            (lambda data: {**data, "engine": "../model.onnx"}, "names an engine outside its directory"),
            (lambda data: {**data, "backend": "tflite"}, "unknown backend 'tflite'; choose one of ort"),
            (
                lambda data: {**data, "requires": {"moon": "full"}},
                "was built for moon full, and this machine has moon none; rebuild it here: nxm build",
            ),
        ],
    )
    def test_a_passport_that_is_not_right_is_refused(self, copy: Path, text: Any, message: str) -> None:
        file = copy / "passport.json"
        if text is None:
            file.unlink()
        else:
            file.write_text(text if isinstance(text, str) else json.dumps(text(json.loads(file.read_text()))))
        with pytest.raises((ArtifactError, EngineError), match=re.escape(message)):
            self.load(copy)

    def test_a_passport_of_the_first_schema_is_read(self, copy: Path) -> None:
        """It had an empty plan for none, named the embedding only where it was INT8, and called precision overrides
        islands."""
        passport = load_passport(copy)
        former = {"schema": "nxm-passport/1", **passport.to_dict()}
        graph = as_object(former["graph"])
        del as_object(former["plan"])["embedding"]
        graph["islands"] = graph.pop("precision_overrides")
        (copy / "passport.json").write_text(json.dumps(former))
        assert load_passport(copy) == passport
        graph["table"] = "00"
        (copy / "passport.json").write_text(json.dumps(former))
        assert load_passport(copy).graph["embedding_sha256"] == "00"
        (copy / "passport.json").write_text(json.dumps({**former, "plan": {}}))
        assert load_passport(copy).plan is None

    def test_a_link_out_of_the_directory_is_refused(self, copy: Path, directory: Path) -> None:
        file = copy / load_passport(copy).engine
        file.unlink()
        file.symlink_to(directory / file.name)
        with pytest.raises((ArtifactError, EngineUnavailable)):
            self.load(copy)


@pytest.mark.parametrize("family", variants(FAMILIES, ("bert",)))
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
    assert passport.options["planned_products"] == 12
    assert passport.options["integer_products"] == 12, passport.options["float_products"]
    assert passport.profiles[0].maximum == (32, tiny.POSITIONS)


@pytest.mark.parametrize("family", variants(FAMILIES, ("bert",)))
@pytest.mark.parametrize("placement", ["inputs", "inputs-outputs"])
@pytest.mark.parametrize("name", cpu_backends())
def test_every_planned_product_runs_on_integers(
    name: str, family: str, placement: str, tiny_engine: Callable[..., Path]
) -> None:
    try:
        facts = backend(name).inspect(tiny_engine(name, family, placement)).to_dict()
    except EngineUnavailable as error:
        pytest.skip(str(error))
    assert facts["integer_products"] == 12, facts["operators"]


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


def test_an_unknown_backend_is_refused_with_the_list() -> None:
    with pytest.raises(EngineError, match=f"unknown backend 'cuda'; choose one of {', '.join(BACKENDS)}"):
        backend("cuda")


def test_a_runtime_that_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tiny_engine: Callable[..., Path]
) -> None:
    path = tiny_engine("ort")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'nxm-export\[ort\]'"):
        backend("ort").load(path)


def test_profiles_rise() -> None:
    Profile((1, 1), (1, 8), (4, 8))
    for sizes in (((2, 1), (1, 8), (4, 8)), ((1, 1), (1, 9), (4, 8)), ((0, 1), (1, 8), (4, 8))):
        with pytest.raises(EngineError, match="profile sizes must rise from 1"):
            Profile(*sizes)


def test_threads_are_recorded_and_used(tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
    (tmp_path / "engine").mkdir()
    passport = ort_backend.build(tiny_graph() / "model.onnx", tmp_path / "engine", BuildOptions(threads=1))
    assert passport.threads == 1
    for options, expected in ((LoadOptions(), 1), (LoadOptions(threads=2), 2)):
        with ort_backend.load(tmp_path / "engine", options) as engine:
            session: Any = engine._session
            assert session.get_session_options().intra_op_num_threads == expected


def test_a_child_process_takes_our_modules_wherever_it_is_started(tmp_path: Path) -> None:
    """A run directory has an ``engines`` folder; with a file in it, ``python -m`` from there would take that for
    ours."""
    for package in ("engines", "nxm_export"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong package')")
    done = subprocess.run(
        module_command("nxm_export", "--version"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("nxm, version"), done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": "two"}, "passport.json: options.threads must be a whole number, got 'two'; build"),
        ({"workspace_bytes": True}, "passport.json: options.workspace_bytes must be a whole number, got True"),
        ({"level": 5, "build_route": ["a"]}, "passport.json: options.build_route must be a text, got ['a']"),
    ],
    ids=str,
)
def test_a_recorded_option_of_another_type_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        replace(PASSPORT, options=options).rebuild_command()


def test_the_command_that_rebuilds_has_the_recorded_options() -> None:
    options = {"sparse": False, "level": 5, "workspace_bytes": 1 << 30, "threads": 2, "build_route": "a=b"}
    command = replace(PASSPORT, options=options).rebuild_command()
    assert command.endswith("--no-sparse --level 5 --workspace 1024 --threads 2 --build-route 'a=b' --out ENGINE_DIR")
