"""Every tensor of an engine lies on the device that it runs on: a GPU takes no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import ROOT
from tools.gpu.fake_accelerator import CannotBuild, build


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_engine_runs_on_a_device_that_takes_no_tensor_of_the_hosts(
    family: str, tiny_graph: Callable[..., Path], tmp_path: Path
) -> None:
    try:
        build()
    except CannotBuild as error:
        pytest.skip(str(error))
    graph = tiny_graph(family, "inputs-outputs", "trt") / "model.onnx"
    command = [sys.executable, "-m", "tests.engines.cusparselt.on_device", str(graph), str(tmp_path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
