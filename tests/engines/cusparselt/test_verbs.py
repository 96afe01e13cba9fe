"""The commands on a stand-in of a GPU machine: each goes through the engine to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engines.benchmark import fastest_backend
from engines.cusparselt import backend as cusparselt
from engines.cusparselt import machine as machines
from engines.cusparselt.machine import Machine
from engines.cusparselt.profiling import KernelRun, ProfiledRun, save_profile
from engines.parity.reports import PARITY_FILE, read_parity_report
from engines.passport import load_passport
from engines.predictor import Predictor
from engines.serving.model import open_model
from engines.serving.settings import ModelOptions
from nxm_export.cli import main
from nxm_export.pipeline.sparsity_twins import TWINS
from nxm_export.reporting.engine_facts import read_engine
from nxm_export.reporting.run_files import Files
from nxm_export.storage.json_files import as_object, as_objects, entry_at
from tests.engines.cusparselt.machines import FACTS, FASTER, SPARSE_KERNEL, Priced
from tests.support import tiny


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has what an engine needs, but for a GPU."""
    stand_in = Machine(Priced(2.0, FASTER), FACTS)
    monkeypatch.setattr(cusparselt, "this_machine", lambda: stand_in)
    monkeypatch.setattr(machines, "what_is_missing", lambda: None)


def nxm(arguments: Sequence[object], code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def answer(arguments: Sequence[object]) -> dict[str, object]:
    return as_object(json.loads(nxm([*arguments, "--json"]).stdout))


@pytest.mark.usefixtures("gpu")
def test_build_compare_and_inspect(
    tmp_path: Path, tiny_graph: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    """Parity by the tolerance of float16, against PyTorch; then what is known of the kernels, which is nothing."""
    graph, engine = tiny_graph("bert", "inputs-outputs", "trt"), tmp_path / "engine"
    built = answer(["build", graph, "--backend", "cusparselt", "--profile", "1x1,2x8,4x48", "--out", engine])
    assert entry_at(built, "device", "kind") == "stand-in"
    checkpoint = tiny_checkpoint("bert")
    _, dev = tiny.write_data(tmp_path / "data")
    nxm(["compare", engine, "--checkpoint", checkpoint, "--data", dev])
    assert read_parity_report(engine / PARITY_FILE).passed
    shown = nxm(["inspect", engine, "--measure"]).stdout
    assert "products, measured when it was built" in shown
    assert entry_at(answer(["inspect", engine]), "profiled", "shape") == [2, 8]
    assert "0.0% of the planned-sparse weights" in nxm(["inspect", engine, "--require-sparse", "60%"], code=3).output


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_twins_are_built_timed_and_judged(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    twins = tmp_path / "twins"
    nxm(["build", tiny_checkpoint("bert"), "--twins", "--backend", "cusparselt", "--out", twins])
    options = {name: load_passport(twins / name).options for name in TWINS}
    assert {name: facts["sparse"] for name, facts in options.items()} == {
        "int8-dense": "never", "int8-sparse": "auto", "fp16": "never",
    }  # fmt: skip
    assert [options[name]["integer_products"] for name in TWINS] == [6 * tiny.LAYERS, 6 * tiny.LAYERS, 0]
    assert {choice["form"] for choice in as_objects(answer(["inspect", twins])["choices"])} == {"sparse fused (M, N)"}
    report = answer(["bench", twins, "--shape", "2x8", "--rounds", "2"])
    assert [row["name"] for row in as_objects(report["timings"])] == list(TWINS)
    sparse = twins / "int8-sparse"
    assert str(report["verdict"]).startswith(
        f"no verdict: which kernels {sparse} runs is not known (profile it with `nxm inspect {sparse} --measure`); "
        "measured "
    )
    said = nxm(["bench", twins, "--shape", "2x8", "--rounds", "1"]).stderr
    assert said.splitlines()[-1].startswith(f"next: nxm inspect {twins} --measure")


@pytest.mark.usefixtures("gpu")
def test_auto_tries_it_where_nothing_is_missing(tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
    assert fastest_backend.candidates() == ("ort", "openvino", "cusparselt")
    graph = tiny_graph("bert", "inputs-outputs")
    built = answer(["build", graph, "--backend", "auto", "--shape", "1x4", "--out", tmp_path / "engine"])
    names = [row["backend"] for row in as_objects(entry_at(built, "options", "auto", "candidates"))]
    assert "cusparselt" in names
    assert not as_object(entry_at(built, "options", "auto", "left_out")).get("cusparselt")


def test_auto_does_not_speak_of_it_elsewhere() -> None:
    assert fastest_backend.candidates() == ("ort", "openvino")


def test_without_a_gpu_the_command_and_the_doctor_say_what_is_missing(
    tmp_path: Path, tiny_graph: Callable[..., Path]
) -> None:
    graph = tiny_graph("bert", "inputs-outputs", "trt")
    refused = nxm(["build", graph, "--backend", "cusparselt", "--out", tmp_path / "engine"], code=1)
    missing = machines.what_is_missing()
    assert missing is not None
    assert missing in " ".join(refused.output.split())
    assert not (tmp_path / "engine").exists()
    assert answer(["doctor"])["backend cusparselt"] == missing


@pytest.mark.usefixtures("gpu")
def test_texts_are_answered_and_an_engine_is_served(tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
    graph, engine = tiny_graph("bert", "inputs-outputs", "trt"), tmp_path / "engine"
    engine.mkdir()
    cusparselt.build(graph / "model.onnx", engine)
    with Predictor(engine) as predictor:
        assert len(predictor.predict(["a good film", "a very dull story", "warm"])) == 3
    model = open_model("m", "1", engine, ModelOptions(instances=1, text=True))
    assert [spec.name for spec in model.endpoints[1].outputs] == ["logits", "label"]
    model.close()


@pytest.mark.usefixtures("gpu")
def test_a_report_takes_what_the_profiler_saw_and_nothing_else(tmp_path: Path, tiny_graph: Callable[..., Path]) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    cusparselt.build(tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx", engine)

    def share() -> float | None:
        entry = read_engine(Files(tmp_path, {}), "engine", "engine", [])
        assert entry.sparsity is not None
        return entry.sparsity.sparse_share

    assert share() == 0.0
    nodes = [weight.node for weight in cusparselt.inspect(engine).sparsity.weights]
    runs = {node: (KernelRun(SPARSE_KERNEL, 1.0),) for node in nodes if "encoder" in node}
    save_profile(engine, ProfiledRun(load_passport(engine).engine_sha256, (8, 48), runs, None))
    assert share() == 1.0


@pytest.mark.usefixtures("gpu")
def test_the_block_that_parts_can_be_asked_for(
    tmp_path: Path, tiny_graph: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    """It is built again with outputs in its middle, which no product or attention may then hide."""
    engine, graph = tmp_path / "engine", tiny_graph("bert", "inputs-outputs", "trt")
    nxm(["build", graph, "--backend", "cusparselt", "--profile", "4x48", "--out", engine])
    _, dev = tiny.write_data(tmp_path / "data")
    shown = nxm(["compare", engine, "--checkpoint", tiny_checkpoint("bert"), "--data", dev, "--bisect"])
    assert "Traceback" not in shown.output
