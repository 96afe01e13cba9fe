"""Everything that needs a GPU, rehearsed: our code against a fake TensorRT with the real bindings' API, and a fake
driver.

The fakes refuse any class, flag, property or parameter that the real bindings of that version lack (see
``tests/engines/tensorrt/fakes/tensorrt``). What they compute is ONNX Runtime's; what they say about kernels is made
up. So this proves that our code runs to its end and reads what it gets, and nothing about TensorRT.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nxm_export.graph.exporter import export
from nxm_export.storage.json_files import as_object, as_objects, entry_at
from tests.support.infer_answers import outputs_of
from tests.support.trt_models import Checkpoints, feeds_for
from tests.support.variants import variants
from tools.benchmarks.servers import free_port, started
from tools.raw_http import Answer, send

TESTS = Path(__file__).parent
ROOT = TESTS.parents[2]
GOLDEN = ROOT / "tests" / "golden" / "trt"
BuiltEngine = tuple[str, Path]  # TensorRT's version, and the engine directory
VERSIONS = {"11.4": ("trt", "matmul"), "10.3": ("trt", "gemm"), "8.6": ("trt8", "conv1x1")}

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="compiling the fake CUDA driver needs gcc")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a fake libcuda.so.1."""
    directory = tmp_path_factory.mktemp("driver")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", directory / "libcuda.so.1", TESTS / "fakes" / "cuda.c"], check=True
    )
    return directory


def environment(driver: Path, version: str, **more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(TESTS / "fakes")])
    api = str(GOLDEN / f"api-{version}.json")
    return {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(driver), "NXM_FAKE_TENSORRT": api, **more}


def nxm(env: dict[str, str], *arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "nxm_export", *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="session")
def checkpoint(checkpoints: Checkpoints) -> Path:
    return checkpoints("bert", "attention", residual="int8", hidden=256)


@pytest.fixture(scope="session", params=variants(VERSIONS, ("11.4",)))
def engine(
    request: pytest.FixtureRequest, driver: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuiltEngine:
    """(version, directory) of an engine with two profiles, built by the fake of that version."""
    target, lowering = VERSIONS[request.param]
    root = tmp_path_factory.mktemp("engine")
    graph = export(checkpoint, root / "graph", target=target, lowering=lowering)
    env = environment(driver, request.param)
    profiles = ["--profile", "1x1,2x16,4x32", "--profile", "4x48"]
    nxm(
        env,
        "build",
        graph.path,
        "--backend",
        "trt",
        "--out",
        root / "engine",
        *profiles,
        "--level",
        "4",
        "--workspace",
        "256",
    )
    return request.param, root / "engine"


def test_a_profile_that_is_beyond_the_gpu_is_refused_before_the_build(
    driver: Path, checkpoint: Path, tmp_path: Path
) -> None:
    graph = export(checkpoint, tmp_path / "graph", target="trt", lowering="matmul")
    env = environment(driver, "11.4", NXM_FAKE_MEMORY="100000")
    build = ("build", graph.path, "--backend", "trt", "--out", tmp_path / "engine")
    complaint = nxm(env, *build, code=1)
    assert "a batch of 32x64 (batch x sequence) needs at least" in complaint
    assert "and the GPU has 0.0 GB; lower --max-batch-tokens, or give --profile with fewer rows" in complaint
    nxm({**env, "NXM_FAKE_MEMORY": "100000000"}, *build, "--max-batch-tokens", 128)
    passport = json.loads((tmp_path / "engine" / "passport.json").read_text())
    assert passport["profiles"] == [{"minimum": [1, 1], "optimum": [2, 64], "maximum": [2, 64]}]


def test_an_engine_directory_is_complete_and_says_where_it_may_run(engine: BuiltEngine) -> None:
    version, directory = engine
    names = {file.name for file in directory.iterdir()}
    assert {"model.engine", "passport.json", "spec.json", "build.log", "layers.json", "weights.json"} <= names
    assert {"timing.cache", "timing.cache.json"} <= names
    passport = json.loads((directory / "passport.json").read_text())
    assert passport["requires"]["gpu"] == "Fake A100"
    assert passport["requires"]["tensorrt"].startswith(version)
    assert passport["device"]["cuda"] == "13.0"
    assert len(passport["profiles"]) == 2
    assert len(json.loads((directory / "layers.json").read_text())["profiles"]) == 2
    built = json.loads((directory / "model.engine").read_bytes().partition(b"\n")[2])
    assert "SPARSE_WEIGHTS" in built["flags"]
    assert "STRICT_NANS" not in built["flags"]
    assert ({"INT8", "FP16"} <= set(built["flags"])) == (version == "8.6"), (
        "weakly typed needs flags, strongly typed has none"
    )
    assert built["set"]["profiling_verbosity"] in ("2", "ProfilingVerbosity.DETAILED")


def test_the_sparsity_report_reads_this_versions_inspector_and_log(engine: BuiltEngine, driver: Path) -> None:
    version, directory = engine
    env = environment(driver, version)
    facts = json.loads(nxm(env, "inspect", directory, "--require-sparse", "60%", "--json"))
    planned = [weight for weight in facts["weights"] if weight["planned_sparse"]]
    assert len(planned) == 6
    assert all(weight["chosen"] is True and "sparse" in weight["kernel"] for weight in planned)
    seen = directory.parent / "kernels.txt"
    seen.write_text("some_other_kernel\n")
    text = nxm(env, "inspect", directory, "--kernels", seen, "--require-sparse", "60%", code=3)
    assert "6 x contradiction" in text, "a kernel that no profiler saw running proves nothing"


def test_an_engine_runs_every_shape_its_profiles_hold_and_refuses_the_rest(engine: BuiltEngine, driver: Path) -> None:
    version, directory = engine
    script = """
import json, sys
import numpy as np
from engines.tensorrt import backend as trt
from nxm_export.errors import EngineError
from tests.support.trt_models import feeds_for
with trt.load(sys.argv[1]) as engine:
    shapes = {}
    for batch, sequence in ((1, 1), (4, 32), (4, 33), (3, 48), (9, 16)):
        outputs = engine.run(feeds_for(engine.inputs, batch, sequence))
        assert outputs["logits"].shape == (batch, 3) and outputs["logits"].dtype == np.float32
        shapes[f"{batch}x{sequence}"] = float(outputs["logits"][0, 0])
    one, many = engine.run(feeds_for(engine.inputs, 9, 16))["logits"], feeds_for(engine.inputs, 9, 16)
    parts = [engine.run({n: a[i : i + 1] for n, a in many.items()})["logits"][0] for i in range(9)]
    assert np.abs(one - np.stack(parts)).max() < 0.05, "slices of a large batch are the batch"
    try:
        engine.run(feeds_for(engine.inputs, 1, 49))
    except EngineError as error:
        print(error)
    times = engine.layer_times(feeds_for(engine.inputs, 2, 16), 2)
    assert times and engine.timer(feeds_for(engine.inputs, 2, 16))() > 0
    engine.close()
try:
    engine.run(feeds_for(engine.inputs, 1, 1))
except EngineError as error:
    print(error)
"""
    env = environment(driver, version)
    done = subprocess.run(
        [sys.executable, "-c", script, directory], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "no profile holds batch 1 x sequence 49" in first
    assert "--profile 1x1,2x16,4x32 --profile 1x1,4x48,4x48" in first, "the command that rebuilds it, as it was built"
    assert "this engine was closed" in second


@pytest.mark.parametrize("captures", [True, False])
def test_runs_of_one_shape_replay_a_cuda_graph_on_the_inputs_of_each(
    captures: bool, engine: BuiltEngine, driver: Path
) -> None:
    version, directory = engine
    script = """
import sys, warnings
import numpy as np
from engines.tensorrt import backend as trt
from nxm_export.errors import EngineError
from tests.support.trt_models import feeds_for
with trt.load(sys.argv[1]) as engine:
    given = feeds_for(engine.inputs, 2, 16)
    inputs = [{**given, "input_ids": given["input_ids"] + turn} for turn in range(10)]
    alone = []
    for feeds in inputs:
        engine.run(feeds_for(engine.inputs, 1, 8))  # another shape between: no graph
        assert engine._graph is None
        alone.append(engine.run(feeds)["logits"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine.run(feeds_for(engine.inputs, 1, 8))
        graphs, together = [], []
        for feeds in inputs:
            graphs.append(engine._graph is not None)
            together.append(engine.run(feeds)["logits"])
        time, queue = engine.timer(inputs[0]), engine.queue_timer(inputs[0], 3)
        assert time() > 0 and time() > 0 and queue() > 0
        assert engine.launches_graph(inputs[0]) == (engine._graph is not None)
        assert not engine.launches_graph(feeds_for(engine.inputs, 1, 8)), "of other shapes"
    assert np.array_equal(alone, together) and len({tuple(a.flatten()) for a in alone}) == len(alone)
    print(graphs, len(said), *(str(one.message) for one in said))
    engine.run(feeds_for(engine.inputs, 1, 8))
    assert engine._graph is None, "of other shapes"
    assert time() > 0 and set(engine._shapes.values()) == {(2, 16)}, "a timer runs its own shape, whatever ran since"
try:
    time()
except EngineError as error:
    assert "was closed" in str(error)
else:
    raise AssertionError("an engine that is closed has no time")
"""
    env = environment(driver, version, **({} if captures else {"NXM_FAKE_NO_CAPTURE": "1"}))
    done = subprocess.run(
        [sys.executable, "-c", script, directory], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if captures:
        assert done.stdout == f"{[False] * 8 + [True] * 2} 0\n"
    else:
        assert done.stdout.startswith(f"{[False] * 10} 1 ")
        assert "cannot be captured in a CUDA graph here" in done.stdout


@pytest.mark.parametrize("engine", variants(["8.6", "11.4"], ("11.4",)), indirect=True)
def test_an_engine_is_served_by_its_profiles_with_the_logits_it_gives_alone(
    engine: BuiltEngine, driver: Path, tmp_path: Path
) -> None:
    version, directory = engine
    env, port = environment(driver, version), free_port()
    shapes = ((1, 4), (2, 16), (4, 48))  # lengths that are buckets, so that the server pads none
    script = """
import json, sys
from engines.tensorrt import backend as trt
from tests.support.trt_models import feeds_for
with trt.load(sys.argv[1]) as engine:
    logits = [engine.run(feeds_for(engine.inputs, *shape))["logits"].tolist() for shape in json.loads(sys.argv[2])]
    print(json.dumps(logits))
"""
    alone = subprocess.run(
        [sys.executable, "-c", script, directory, json.dumps(shapes)],
        env=env, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    command = [sys.executable, "-m", "nxm_export", "serve", f"m={directory}", "--port", str(port)]
    with started(command, env, port, tmp_path / "log"):
        metadata = as_object(send(port, "GET", "/v2/models/m").json())
        names = [str(entry["name"]) for entry in as_objects(metadata["inputs"])]
        assert metadata["platform"] == "tensorrt_plan"

        def ask(rows: int, length: int) -> Answer:
            inputs = [
                {"name": name, "datatype": "INT64", "shape": [rows, length], "data": array.ravel().tolist()}
                for name, array in feeds_for(names, rows, length).items()
            ]
            return send(port, "POST", "/v2/models/m/infer", json.dumps({"inputs": inputs}).encode())

        for shape, expected in zip(shapes, json.loads(alone.stdout), strict=True):
            (output,) = outputs_of(ask(*shape)).values()
            # float sums in another order may move a quantizer's input over the edge of a step
            assert np.abs(output - expected).max() < 0.05
        for rows, length, complaint in ((1, 49, "longer than the 48"), (5, 48, "larger than the 4")):
            refused = ask(rows, length)
            assert (refused.status, complaint in str(entry_at(refused.json(), "error"))) == (400, True)


@pytest.mark.parametrize("engine", ["8.6", "11.4"], indirect=True)
def test_a_triton_configuration_has_the_profiles_and_types_of_the_plan_itself(
    engine: BuiltEngine, driver: Path, tmp_path: Path
) -> None:
    version, directory = engine
    nxm(environment(driver, version), "triton", f"m={directory}", "--out", tmp_path / "repository")
    config = (tmp_path / "repository" / "m" / "config.pbtxt").read_text()
    assert 'profile: [ "0", "1" ]' in config
    assert ("TYPE_INT32" in config) == (version == "8.6"), "TensorRT 8.6 has no int64: its engines take int32"
    assert 'key: "8.0"' in config
    assert (tmp_path / "repository" / "m" / "1" / "model_sm80.plan").read_bytes() == (
        directory / "model.engine"
    ).read_bytes()
    manifest = json.loads((tmp_path / "repository" / "manifest.json").read_text())
    assert manifest["tensorrt"].startswith(version)


@pytest.mark.parametrize("engine", ["11.4"], indirect=True)
def test_another_gpu_version_or_file_is_refused_before_anything_is_deserialized(
    engine: BuiltEngine, driver: Path, tmp_path: Path
) -> None:
    version, directory = engine
    other = "10.3" if version != "10.3" else "11.4"
    run = ["bench", directory, "--shape", "1x8", "--rounds", "1"]
    text = nxm(environment(driver, version, NXM_FAKE_GPU="Fake L40S"), *run, code=1)
    assert "was built for gpu Fake A100, and this machine has gpu Fake L40S; rebuild it here: nxm build" in text
    text = nxm(environment(driver, other), *run, code=1)
    assert f"was built for tensorrt {version}" in text
    assert f"this machine has tensorrt {other}" in text
    text = nxm(environment(driver, version, NXM_FAKE_NO_GPU="1"), *run, code=1)
    assert "the driver is here and finds no GPU" in text
    broken = tmp_path / "engine"
    shutil.copytree(directory, broken)
    (broken / "model.engine").write_bytes((directory / "model.engine").read_bytes()[:-1])
    text = nxm(environment(driver, version), "bench", broken, code=1)
    assert "is not the engine of its passport" in text


@pytest.mark.parametrize("engine", ["11.4"], indirect=True)
def test_a_corrupt_engine_with_a_matching_passport_keeps_tensorrts_words(
    engine: BuiltEngine, driver: Path, tmp_path: Path
) -> None:
    from nxm_export.storage.hashing import file_hash

    version, directory = engine
    broken = tmp_path / "engine"
    shutil.copytree(directory, broken)
    (broken / "model.engine").write_bytes(b"garbage")
    passport = json.loads((broken / "passport.json").read_text())
    passport["engine_sha256"] = file_hash(broken / "model.engine")
    (broken / "passport.json").write_text(json.dumps(passport))
    text = nxm(environment(driver, version), "bench", broken, code=1)
    assert "magicTagRead == magicTag failed" in text
    assert "rebuild it: nxm build" in text


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["11.4"], indirect=True)
def test_a_timing_cache_is_used_again_and_a_bad_one_is_refused_or_replaced(
    engine: BuiltEngine, driver: Path, tmp_path: Path
) -> None:
    version, directory = engine
    env, graph = environment(driver, version), directory.parent / "graph" / "model.onnx"
    cache = tmp_path / "timing.cache"
    for name in ("timing.cache", "timing.cache.json"):
        shutil.copyfile(directory / name, tmp_path / name)
    build = ["build", graph, "--backend", "trt", "--out", tmp_path / "out", "--json"]
    assert json.loads(nxm(env, *build, "--timing-cache", cache))["options"]["timing_cache"] is True
    assert json.loads(nxm(env, *build))["options"]["timing_cache"] is True, "its own, from the build before"
    cache.write_bytes(b"torn")
    assert "it is damaged; delete it" in nxm(env, *build, "--timing-cache", cache, code=1)
    (tmp_path / "out" / "timing.cache").write_bytes(b"torn")
    assert json.loads(nxm(env, *build))["options"]["timing_cache"] is False, "nobody asked for it: a new one is begun"
    shutil.copyfile(directory / "timing.cache", cache)
    text = nxm(environment(driver, version, NXM_FAKE_GPU="Fake L40S"), *build, "--timing-cache", cache, code=1)
    assert "it was measured on tensorrt" in text
    assert "gpu Fake A100" in text
    (tmp_path / "timing.cache.json").unlink()
    assert "nothing says what it was measured on" in nxm(env, *build, "--timing-cache", cache, code=1)


def test_build_routes_pass_only_where_they_are_listed(engine: BuiltEngine, driver: Path, tmp_path: Path) -> None:
    version, directory = engine
    env, graph = environment(driver, version), directory.parent / "graph" / "model.onnx"
    build = ["build", graph, "--backend", "trt", "--out", tmp_path / "out", "--json"]
    text = nxm(env, *build, "--build-route", "-cask:sparsity=must", code=1)
    assert "does not list 'cask:sparsity' among its build routes" in text
    if version == "11.4":
        done = json.loads(nxm(env, *build, "--build-route", "-conv_use_long_w=off"))
        assert done["options"]["build_route"] == "-conv_use_long_w=off"
    else:
        assert "it lists none" in nxm(env, *build, "--build-route", "-conv_use_long_w=off", code=1)


def test_a_graph_for_the_other_kind_of_tensorrt_is_refused(engine: BuiltEngine, driver: Path, tmp_path: Path) -> None:
    version, directory = engine
    other = "11.4" if version == "8.6" else "8.6"
    graph = directory.parent / "graph" / "model.onnx"
    text = nxm(environment(driver, other), "build", graph, "--backend", "trt", "--out", tmp_path / "out", code=1)
    assert ("export with --target trt8" if other == "8.6" else "export with --target trt") in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_twins_are_built_timed_and_judged(driver: Path, checkpoint: Path, tmp_path: Path) -> None:
    env = environment(driver, "11.4")
    nxm(env, "build", checkpoint, "--twins", "--backend", "trt", "--out", tmp_path / "twins", "--profile", "4x32")
    report = json.loads(
        nxm(env, "bench", tmp_path / "twins", "--shape", "1x8", "--shape", "4x32", "--rounds", "6", "--json")
    )
    assert {timing["name"] for timing in report["timings"]} == {"int8-dense", "int8-sparse", "fp16"}
    assert {(timing["clock"], timing["launches_graph"]) for timing in report["timings"]} == {("CUDA events", True)}
    assert all(timing["queued"] > 0 for timing in report["timings"])
    assert report["verdict"].startswith(("2:4 pays from batch x sequence >= ", "do not use 2:4 here: "))
    facts = json.loads(nxm(env, "inspect", tmp_path / "twins", "--measure", "--json"))
    saved = [weight["saved_ms"] for weight in facts["weights"] if weight["planned_sparse"]]
    assert saved == pytest.approx([0.01] * 6, abs=1e-9)  # the fake's layers take 0.02 ms dense and 0.01 ms sparse
    dense = json.loads(nxm(env, "inspect", tmp_path / "twins" / "int8-dense", "--json"))
    assert {weight["reason"] for weight in dense["weights"] if weight["planned_sparse"]} == {"flag-off"}
    assert dense["sparse_share"] == 0


def test_the_float_twin_of_a_weakly_typed_tensorrt_does_not_ask_for_integers(
    driver: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """8.6 would want a calibrator, and fail; the fake does so, too."""
    env = environment(driver, "8.6")
    twins = ("--twins", "--backend", "trt", "--target", "trt8", "--profile", "4x32")
    nxm(env, "build", checkpoint, *twins, "--out", tmp_path / "twins")
    flags = {}
    for twin in ("int8-dense", "int8-sparse", "fp16"):
        written = (tmp_path / "twins" / twin / "model.engine").read_bytes()
        flags[twin] = json.loads(written[written.index(b"{") :])["flags"]
    assert flags == {
        "int8-dense": ["FP16", "INT8"],
        "int8-sparse": ["FP16", "INT8", "SPARSE_WEIGHTS"],
        "fp16": ["FP16"],
    }


def test_issue_4694_and_its_fix_in_the_report(driver: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The fake chooses dense for float outputs, as TensorRT does there; the report must say why."""
    env, reports = environment(driver, "8.6"), {}
    for placement in ("inputs", "inputs-outputs"):
        graph = export(checkpoint, tmp_path / placement, target="trt8", placement=placement)
        nxm(env, "build", graph.path, "--backend", "trt", "--out", tmp_path / f"{placement}-engine")
        reports[placement] = json.loads(nxm(env, "inspect", tmp_path / f"{placement}-engine", "--json"))
    dense = {
        weight["name"].split(".")[-2] for weight in reports["inputs"]["weights"] if weight["reason"] == "float-output"
    }
    assert dense == {"query", "key", "value", "dense"}
    assert reports["inputs"]["counts"]["sparse"] == 1, (
        "the FFN's first matrix: its GELU is followed by the next quantizer"
    )
    assert reports["inputs-outputs"]["counts"]["sparse"] == 6


def test_without_tensorrt_it_says_what_to_install(checkpoint: Path, tmp_path: Path) -> None:
    graph = export(checkpoint, tmp_path / "graph", target="trt")
    text = nxm(
        {**os.environ, "PYTHONPATH": str(ROOT)},
        "build",
        graph.path,
        "--backend",
        "trt",
        "--out",
        tmp_path / "out",
        code=1,
    )
    assert "TensorRT is not installed; pip install 'nxm-export[trt]', and TensorRT beside it: tensorrt-cu13" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_evidence_tool_runs_to_its_page(driver: Path, tmp_path: Path) -> None:
    version, only = "8.6", "inputs-tanh-matmul"
    row = "| tiny-inputs-tanh-matmul | 1 / 6 | 33.3% | 5 float-output |"
    command = [sys.executable, "-m", "tools.gpu.evidence", "--models", "tiny", "--shapes", "1x8,4x32"]
    command += ["--rounds", "3", "--only", only, "--out", str(tmp_path / "docs"), "--work", str(tmp_path / "work")]
    env = environment(driver, version)
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "docs").glob("*.md")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Fake A100, TensorRT ")
    for line in (row, "| 4x32 | ", "## Verdicts", "Not shown here: "):
        assert line in text, text
    assert "error:" not in text
    again = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "tiny" not in again.stderr, "what is done is not done again"
