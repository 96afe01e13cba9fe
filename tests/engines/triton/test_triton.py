"""The Triton repository: its text parsed by Triton's own message definition, its models loaded by the real server."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from engines.base import LoadOptions
from engines.ort import backend as ort
from engines.passport import PASSPORT_FILE
from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.triton import export_repository
from nxm_export.cli import main
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS
from nxm_export.errors import ArtifactError, ServeError
from tests.engines.triton.conftest import PROFILES, plan_directory
from tests.support import baked, exact_engine
from tools.benchmarks.servers import Running, triton, triton_venv


@cache
def definition() -> Any:
    """Triton's own message definition, a file of tritonclient; its package would want grpc, which the file does not."""
    home = importlib.util.find_spec("tritonclient")
    if home is None or not home.submodule_search_locations:
        pytest.skip("tritonclient is not installed; pip install -e '.[dev]'")
    file = Path(home.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(*files: Path) -> dict[str, Any]:
    """Configurations by name; raises `text_format.ParseError` for what Triton would not read."""
    from google.protobuf import json_format, text_format

    configs = {}
    for file in files:
        config = text_format.Parse(file.read_text(encoding="utf-8"), definition().ModelConfig())
        configs[config.name] = json_format.MessageToDict(config, preserving_proto_field_name=True)
    return configs


def test_the_configuration_of_plans_says_everything_that_the_passport_knows(
    plans: list[EngineSource], tmp_path: Path
) -> None:
    export_repository(plans, tmp_path / "repo", TritonOptions(instances=2, max_batch=16))
    config = parse(tmp_path / "repo" / "planned" / "config.pbtxt")["planned"]
    names = ("input_ids", "attention_mask", "token_type_ids")
    zero = {"data_type": "TYPE_INT32", "zero_data": True}
    assert config == {
        "name": "planned",
        "backend": "tensorrt",
        "platform": "tensorrt_plan",
        "max_batch_size": 4,  # what fits into the profile of the long sequences
        "default_model_filename": "model_sm80.plan",
        "cc_model_filenames": {"8.0": "model_sm80.plan", "9.0": "model_sm90.plan"},
        "input": [{"name": name, "data_type": "TYPE_INT32", "dims": ["-1"]} for name in names],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["2"]}],
        "version_policy": {"latest": {"num_versions": 1}},
        "dynamic_batching": {},  # with no delay and no queue policy: see the module text of engines.triton.config
        "instance_group": [{"kind": "KIND_GPU", "count": 2, "profile": ["0", "1"]}],
        "model_warmup": [
            {
                "name": f"batch {batch} length {length}",
                "batch_size": batch,
                "inputs": {name: {**zero, "dims": [str(length)]} for name in names},
            }
            for batch, length in ((4, 16), (2, 48))
        ],
    }


def test_the_text_face_is_an_ensemble_of_tokenizer_engine_and_labels(engine: Path, tmp_path: Path) -> None:
    export_repository([EngineSource("m", "1", engine)], tmp_path / "repo", TritonOptions(pair=True, threads=1))
    configs = parse(*sorted((tmp_path / "repo").glob("*/config.pbtxt")))
    assert set(configs) == {"m", "m_tokenizer", "m_labels", "m_text"}
    assert configs["m"]["parameters"] == {"intra_op_thread_count": {"string_value": "1"}}
    assert configs["m"]["instance_group"] == [{"kind": "KIND_CPU", "count": 1}]
    ensemble = configs["m_text"]
    assert [(i["name"], i.get("optional", False)) for i in ensemble["input"]] == [("text", False), ("text_pair", False)]
    assert [(o["name"], o["data_type"]) for o in ensemble["output"]] == [
        ("logits", "TYPE_FP32"),
        ("label", "TYPE_STRING"),
    ]
    assert [step["model_name"] for step in ensemble["ensemble_scheduling"]["step"]] == ["m_tokenizer", "m", "m_labels"]
    assert "instance_group" not in ensemble


def test_the_second_text_is_optional_as_on_nxm_serve(engine: Path, tmp_path: Path) -> None:
    export_repository([EngineSource("m", "1", engine)], tmp_path / "repo", TritonOptions(text=True, threads=1))
    configs = parse(*sorted((tmp_path / "repo").glob("*/config.pbtxt")))
    for name in ("m_tokenizer", "m_text"):
        inputs = [(i["name"], i.get("optional", False)) for i in configs[name]["input"]]
        assert inputs == [("text", False), ("text_pair", True)]


@pytest.mark.parametrize("suffix", ["text", "tokenizer", "labels"])
def test_a_model_with_the_name_of_anothers_part_is_refused(engine: Path, tmp_path: Path, suffix: str) -> None:
    sources = [EngineSource("m", "1", engine), EngineSource(f"m_{suffix}", "1", engine)]
    with pytest.raises(ServeError, match=f"m and m_{suffix} both need the name m_{suffix}"):
        export_repository(sources, tmp_path / "repo", TritonOptions(text=True, threads=1))
    assert not (tmp_path / "repo").exists()
    export_repository(sources, tmp_path / "repo", TritonOptions(threads=1))


@pytest.mark.parametrize(("tokens", "rows"), [(MAX_BATCH_TOKENS, 32), (100, 2), (1, 1)])
def test_without_profiles_the_longest_input_limits_the_rows(
    engine: Path, tmp_path: Path, tokens: int, rows: int
) -> None:
    options = TritonOptions(text=True, max_batch_tokens=tokens)
    export_repository([EngineSource("m", "1", engine)], tmp_path / "repo", options)
    written = parse(*sorted((tmp_path / "repo").glob("*/config.pbtxt")))
    assert {config["max_batch_size"] for config in written.values()} == {rows}


def test_a_field_that_triton_does_not_know_is_found(engine: Path, tmp_path: Path) -> None:
    export_repository([EngineSource("m", "1", engine)], tmp_path / "repo")
    file = tmp_path / "repo" / "m" / "config.pbtxt"
    file.write_text(file.read_text() + "max_queue_delay: 3\n")
    from google.protobuf import text_format

    with pytest.raises(text_format.ParseError, match="max_queue_delay"):
        parse(file)


@pytest.fixture(scope="module")
def plan_server(plans: list[EngineSource], engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Triton on a repository with plans for two GPUs (as KIND_CPU: there is none here) and a model of two sentences."""
    venv = triton_venv()
    if isinstance(venv, str):
        pytest.skip(venv)
    home = tmp_path_factory.mktemp("plan-repository")
    sources = [*plans, EngineSource("pairs", "1", engine)]
    export_repository(sources, home / "repo", TritonOptions(text=True, pair=True, kind="cpu"))
    with triton(home / "repo", home / "log", venv) as running:
        yield running


@pytest.mark.slow
def test_triton_loads_plans_and_infers_through_the_backend_double(plan_server: Running) -> None:
    client_http = pytest.importorskip("tritonclient.http")
    feeds = exact_engine.feeds_of([5, 9])
    inputs = []
    for name, array in feeds.items():
        inputs.append(client_http.InferInput(name, array.shape, "INT32"))
        inputs[-1].set_data_from_numpy(array.astype(np.int32))
    with client_http.InferenceServerClient(plan_server.address) as client:
        assert client.get_model_metadata("planned")["platform"] == "tensorrt_plan"
        np.testing.assert_array_equal(client.infer("planned", inputs).as_numpy("logits"), exact_engine.expected(feeds))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["planned_text", "pairs_text"])
def test_pairs_of_sentences_run_through_the_ensemble(plan_server: Running, model: str) -> None:
    client_http = pytest.importorskip("tritonclient.http")
    inputs = []
    for name, word in (("text", "good film"), ("text_pair", "bad")):
        inputs.append(client_http.InferInput(name, [1, 1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([[word.encode()]], object))
    encoding = exact_engine.tokenizer().encode("good film", "bad")
    feeds = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
    with client_http.InferenceServerClient(plan_server.address) as client:
        actual = client.infer(model, inputs).as_numpy("logits")
    np.testing.assert_array_equal(actual, exact_engine.expected({k: np.array([v]) for k, v in feeds.items()}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backend": "trt_rtx"}, "no backend for trt_rtx engines"),
        ({"bindings": {}}, "does not say what the engine's inputs are"),
        ({"requires": {}}, "does not name its TensorRT version"),
        (
            {
                "bindings": {
                    "inputs": [{"name": "x", "dtype": "int64", "shape": [8, -1]}],
                    "outputs": [{"name": "y", "dtype": "float32", "shape": [8, 2]}],
                }
            },
            "fixed batch",
        ),
        (
            {
                "bindings": {
                    "inputs": [{"name": "x", "dtype": "complex64", "shape": [-1, -1]}],
                    "outputs": [{"name": "y", "dtype": "float32", "shape": [-1, 2]}],
                }
            },
            "no type for complex64",
        ),
        ({"engine_sha256": "0" * 64}, "is not the engine of its passport"),
    ],
)
def test_what_triton_cannot_load_is_refused_and_nothing_is_left(
    engine: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    directory = plan_directory(engine, tmp_path / "engine", "8.0", **changes)
    with pytest.raises((ServeError, ArtifactError), match=complaint):
        export_repository([EngineSource("m", "1", directory)], tmp_path / "repo")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_engines_of_one_name_must_be_one_model_for_different_gpus(
    plans: list[EngineSource], engine: Path, tmp_path: Path
) -> None:
    same = EngineSource("planned", "1", plan_directory(engine, tmp_path / "same", "8.0"))
    other = EngineSource("planned", "1", plan_directory(engine, tmp_path / "other", "8.6", onnx_sha256="0" * 64))
    built = EngineSource("planned", "1", plan_directory(engine, tmp_path / "built", "8.6", profiles=PROFILES[:1]))
    newer = EngineSource(
        "newer", "1", plan_directory(engine, tmp_path / "newer", "8.6", requires={"tensorrt": "11.0.0"})
    )
    for sources, complaint in (
        ([*plans, same], "different compute capabilities"),
        ([plans[0], EngineSource("planned", "1", engine)], "different compute capabilities"),
        ([*plans, other], "different graphs"),
        ([*plans, built], "differ in their inputs, outputs or profiles"),
        ([*plans, newer], "need TensorRT 10.14.1.48 and 11.0.0"),
        ([], "nothing to hand over"),
    ):
        with pytest.raises(ServeError, match=complaint):
            export_repository(sources, tmp_path / "repo")
    with pytest.raises(ServeError, match=r"the container has 10\.13\.0: it would refuse them"):
        export_repository(plans, tmp_path / "repo", TritonOptions(tensorrt="10.13.0"))


def test_only_a_repository_of_ours_is_replaced(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="no repository of ours"):
        export_repository([EngineSource("m", "1", engine)], tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    copy = Path(shutil.copytree(engine, tmp_path / "engine"))
    with pytest.raises(ArtifactError, match="no repository of ours"):
        export_repository([EngineSource("m", "1", copy)], copy)
    assert (copy / PASSPORT_FILE).is_file()
    for name in ("first", "second"):
        export_repository([EngineSource(name, "1", engine)], tmp_path / "repo")
    assert [path.name for path in (tmp_path / "repo").iterdir() if path.is_dir()] == ["second"]


def test_the_command_writes_a_repository_and_names_its_files(engine: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["triton", f"m={engine}", "--out", str(tmp_path / "repo"), "--text", "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["models"]) == {"m"}
    assert (tmp_path / "repo" / "m_text" / "config.pbtxt").is_file()


def test_an_onnx_engine_is_configured_as_it_was_proven(tiny_engine: Callable[..., Path], tmp_path: Path) -> None:
    export = EngineSource("m", "1", tiny_engine("ort"))
    manifest = export_repository([export], tmp_path / "repo")
    assert parse(tmp_path / "repo" / "m" / "config.pbtxt")["m"]["optimization"] == {"graph": {"level": -1}}
    (facts,) = manifest.models["m"]
    assert facts.session is not None
    assert (facts.session.level, facts.session.difference) == ("basic", 0.0)
    assert "# ONNX Runtime with basic optimizations: outputs are those of the proven one" in (
        tmp_path / "repo" / "m" / "config.pbtxt"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "following"),
    [
        ((), "next: nxm build GRAPH --onnxruntime 1.19"),
        (("--image", "nvcr.io/nvidia/tritonserver:99.01-py3"), "next: docker compose"),
    ],
)
def test_a_container_that_cannot_load_the_engine_is_not_what_to_start_next(
    tiny_engine: Callable[..., Path], tmp_path: Path, options: tuple[str, ...], following: str
) -> None:
    result = CliRunner().invoke(main, ["triton", f"m={tiny_engine('ort')}", "--out", str(tmp_path / "repo"), *options])
    assert result.exit_code == 0, result.output
    assert following in result.stderr


def test_a_session_on_a_gpu_is_not_called_the_proven_one(tiny_engine: Callable[..., Path], tmp_path: Path) -> None:
    manifest = export_repository(
        [EngineSource("m", "1", tiny_engine("ort"))], tmp_path / "repo", TritonOptions(kind="gpu")
    )
    (facts,) = manifest.models["m"]
    assert facts.session is not None
    assert facts.session.difference is None
    assert "not compared with the proven one: it ran on the CPU, and instances of gpu run other kernels" in (
        tmp_path / "repo" / "m" / "config.pbtxt"
    ).read_text(encoding="utf-8")


@pytest.mark.slow
def test_triton_gives_the_bits_of_the_proven_session(tiny_engine: Callable[..., Path], tmp_path: Path) -> None:
    """The real server, with the double that reads the level as the compiled backend does; with all optimizers it
    gives others."""
    client_http = pytest.importorskip("tritonclient.http")
    venv = triton_venv()
    if isinstance(venv, str):
        pytest.skip(venv)
    directory, answers = tiny_engine("ort"), []
    feeds = baked.feeds("bert", 6, 11, padding=4)
    inputs = []
    for name, array in feeds.items():
        inputs.append(client_http.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array)
    export_repository([EngineSource("m", "1", directory)], tmp_path / "repo", TritonOptions(threads=1))
    config = tmp_path / "repo" / "m" / "config.pbtxt"
    for text in (config.read_text(), config.read_text().replace("level: -1", "level: 0")):
        config.write_text(text)
        with (
            triton(tmp_path / "repo", tmp_path / "log", venv) as running,
            client_http.InferenceServerClient(running.address) as client,
        ):
            answers.append(client.infer("m", inputs).as_numpy("logits"))
    with ort.load(directory, LoadOptions(threads=1)) as engine:
        proven = engine.run(feeds)["logits"]
    np.testing.assert_array_equal(answers[0], proven)
    assert not np.array_equal(answers[1], proven)
