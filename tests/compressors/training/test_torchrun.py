"""Two processes do what one does: the same table, plan and masks, and one state between them.

Sums of floats depend on their order, so the weights of two processes differ from those of one in the last digits, and a
mask would differ where two magnitudes of a group tie within them; at a usual learning rate none does in these steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from compressors.training.trainer import Phase, training_arguments
from nxm_export.cli import main
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.errors import DataError
from tests.support import tiny
from tests.support.torchrun import in_two_processes
from tests.support.torchrun_job import job

WORLD = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny.copy_dense(tiny_checkpoint("bert"), tmp_path_factory.mktemp("torchrun"))


@pytest.fixture(scope="module")
def one(desk: Path) -> dict[str, Any]:
    (desk / "one").mkdir()
    return job(desk, desk / "one")


@pytest.fixture(scope="module")
def two(desk: Path) -> list[dict[str, Any]]:
    """What each of two gloo processes says; the job itself asserts the world size."""
    (desk / "two").mkdir()
    in_two_processes("tests.support.torchrun_job", str(desk), str(desk / "two"))
    return list(json.loads((desk / "two" / "processes.json").read_text()))


@pytest.mark.slow
def test_both_processes_hold_the_same_state_after_every_dual_update_and_at_the_end(two: list[dict[str, Any]]) -> None:
    first, second = two
    assert first["states"] == second["states"]
    assert len(first["states"]) >= 3, "at least two dual updates, and the trained weights"
    assert first["metrics"] == second["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sensitivity.csv", "trials.csv", "plan.json"])
def test_the_search_finds_the_same_to_the_last_bit(
    desk: Path, one: dict[str, Any], two: list[dict[str, Any]], name: str
) -> None:
    assert (desk / "two" / "searched" / name).read_bytes() == (desk / "one" / "searched" / name).read_bytes()


@pytest.mark.slow
def test_the_first_gradient_is_that_of_the_whole_batch(
    desk: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    """Losses are means over tokens and samples, and processes get sentences of different lengths."""
    expected = torch.load(desk / "one" / "gradients-0.pt")
    for rank in range(2):
        actual = torch.load(desk / "two" / f"gradients-{rank}.pt")
        actual = {name.removeprefix("module."): grad for name, grad in actual.items()}
        assert actual.keys() == expected.keys()
        error = math.sqrt(sum(float((actual[name] - grad).square().sum()) for name, grad in expected.items()))
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in expected.values()))
        assert error < 1e-5 * norm, "float32 sums in another order"
        steps = [name for name in expected if name.endswith("log_scale")]
        error = math.sqrt(sum(float((actual[name] - expected[name]).square().sum()) for name in steps))
        norm = math.sqrt(sum(float(expected[name].square().sum()) for name in steps))
        assert error < 1e-3 * norm, "quantizer steps: sums over all tokens that cancel nearly"


@pytest.mark.slow
def test_plan_and_masks_are_those_of_one_process(desk: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    alone, both = open_checkpoint(desk / "one" / "checkpoint"), open_checkpoint(desk / "two" / "checkpoint")
    both.require_valid()
    assert both.plan == alone.plan
    assert any(spec.pattern for spec in both.plan.weights.values())
    assert two[0]["metrics"]["mask_hash"] == one["metrics"]["mask_hash"]
    hashes = [
        json.loads((desk / processes / "obs" / "metrics.json").read_text())["mask_hash"] for processes in ("one", "two")
    ]
    assert hashes[0] == hashes[1] != one["metrics"]["mask_hash"], "second-order masks, and others than ADMM's"
    solved = [open_checkpoint(desk / processes / "admm") for processes in ("one", "two")]
    for name in solved[0].plan.weights:
        one_by_one, shared = (checkpoint.weight(name) for checkpoint in solved)
        # Two processes have half of the threads each, and sums in another order: a tie may fall to the other side.
        same = np.isclose(one_by_one, shared, rtol=1e-3, atol=1e-6)
        assert same.mean() > 0.99, name
    assert two[0]["metrics"]["residual"] == pytest.approx(one["metrics"]["residual"], rel=1e-3)


@pytest.mark.slow
def test_only_the_first_process_leaves_files(desk: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    def files(root: Path) -> set[str]:
        own = ("gradients-", "processes.json")  # of the job
        return {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file() and not f.name.startswith(own)}

    assert files(desk / "two") == files(desk / "one")


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DataError, match="batch size 16 is not divisible by 3 processes"):
        training_arguments(Phase("qat", 1, 1e-4, 16), tmp_path, 0, "fp32")


@pytest.mark.parametrize("command", ["run", "export", "bench"])
def test_other_commands_are_no_work_for_torchrun(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, [command, "anything"])
    assert result.exit_code == 2
    assert f"nxm {command} is no work for torchrun" in result.output


def test_a_model_without_head_is_fine_tuned_in_one_process_first(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)
    encoder = tiny.write_model("bert", tmp_path / "encoder")
    data = ["--train", str(desk / "train.tsv"), "--dev", str(desk / "dev.tsv"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["compress", str(encoder), *data])
    assert result.exit_code == 1
    assert "fine-tune it in one process first" in result.output
