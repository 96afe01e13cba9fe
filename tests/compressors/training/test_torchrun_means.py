"""Two processes train to the weights of one, however unequally their parts of a batch hold what a loss is the mean of:
tokens, labelled tokens, labelled samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressors.models import load_model, resolve
from nxm_export.contract.tasks import task_named
from tests.support.torchrun import in_two_processes
from tests.support.torchrun_phases import CASES, train, write_models

# What a softmax takes away again has no gradient but rounding errors, which Adam makes steps of.
WITHOUT_GRADIENT = ("key.bias", "qa_outputs.bias")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("means")
    write_models(home)
    for processes in ("one", "two"):
        (home / processes).mkdir()
    train(home, home / "one")
    in_two_processes("tests.support.torchrun_phases", str(home), str(home / "two"))
    return home


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_to_the_weights_of_one(desk: Path, case: str) -> None:
    task = CASES[case][0]
    start = load_model(resolve(desk / task / "student"), task_named(task)).state_dict()
    one, two = (torch.load(desk / processes / f"{case}.pt") for processes in ("one", "two"))
    names = [name for name in start if start[name].is_floating_point() and not name.endswith(WITHOUT_GRADIENT)]
    moved = sum(float((one[name] - start[name]).square().sum()) for name in names) ** 0.5
    apart = sum(float((one[name] - two[name]).square().sum()) for name in names) ** 0.5
    # float32 sums in another order: about 1e-6 of the way. Means of each process's own were 4e-3 apart and more.
    assert moved > 0.1
    assert apart < 1e-5 * moved
