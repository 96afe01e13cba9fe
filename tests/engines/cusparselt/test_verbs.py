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
from engines.parity.reports import PARITY_FILE, read_parity_report
from engines.passport import load_passport
from nxm_export.cli import main
from nxm_export.pipeline.sparsity_twins import TWINS
from nxm_export.storage.json_files import as_object, as_objects, entry_at
from tests.engines.cusparselt.machines import FACTS, Priced
from tests.engines.cusparselt.test_backend import FASTER
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
    nxm(["compare", checkpoint, engine, "--data", dev])
    assert read_parity_report(engine / PARITY_FILE).passed
    shown = nxm(["inspect", engine, "--measure"]).stdout
    assert "products, measured when it was built" in shown
    assert entry_at(answer(["inspect", engine]), "profiled", "shape") == [2, 8]
    assert "0.0% of the planned-sparse weights" in nxm(["inspect", engine, "--require-sparse", "60%"], code=3).output


@pytest.mark.usefixtures("gpu")
def test_twins_are_built_timed_and_judged(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    twins = tmp_path / "twins"
    nxm(["build", tiny_checkpoint("bert"), "--twins", "--backend", "cusparselt", "--out", twins])
    options = {name: load_passport(twins / name).options for name in TWINS}
    assert {name: facts["sparse"] for name, facts in options.items()} == {
        "int8-dense": False, "int8-sparse": True, "fp16": False,
    }  # fmt: skip
    assert [options[name]["integer_products"] for name in TWINS] == [6 * tiny.LAYERS, 6 * tiny.LAYERS, 0]
    assert {choice["form"] for choice in as_objects(answer(["inspect", twins])["choices"])} == {"sparse fused (M, N)"}
    report = answer(["bench", twins, "--shape", "2x8", "--rounds", "2"])
    assert [row["name"] for row in as_objects(report["timings"])] == list(TWINS)
    assert "no sparse kernel is proven to run" in str(report["verdict"])


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
