"""A search that is killed goes on with what it measured, and with nothing else."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressors.search import sensitivity
from tests.compressors.search.commands import search

KILLED = """
import os, signal, sys
from compressors.search.plan_search import search
from compressors.search.settings import SearchSettings
from compressors.settings import Settings

def progress(what, done, total):
    if what == sys.argv[3] and done == 1:
        os.kill(os.getpid(), signal.SIGKILL)

search(sys.argv[1] + "/dense", task="classification", train=sys.argv[1] + "/train.tsv", out=sys.argv[2],
       settings=SearchSettings(samples=24, held_out=24, swaps=6, compression=0.85),
       training=Settings(seed=0, threads=1), progress=progress)
"""


def test_a_killed_search_goes_on_with_what_it_measured(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "out", list[int]()
    command = [sys.executable, "-c", KILLED, str(desk), str(out), "sensitivity"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    part = sensitivity.read_sensitivities(tmp_path / ".out.work" / "sensitivity-0.csv")
    assert {entry.weight.split(".")[3] for entry in part} == {"0"}, "the first block is on disk"
    plain = sensitivity._measure_block

    def counting(*arguments: Any) -> Any:
        measured.append(arguments[-1])
        return plain(*arguments)

    monkeypatch.setattr(sensitivity, "_measure_block", counting)
    assert search(desk, out).exit_code == 0
    assert measured == [1], "block 0 is not measured again"
    assert json.loads((out / "search.json").read_text())["cost"]["resumed"]
    assert search(desk, tmp_path / "whole").exit_code == 0
    for name in ("sensitivity.csv", "trials.csv", "plan.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: re.sub(r",[^,]+,([^,]+)$", r",nan,\1", text.rstrip()) + "\r\n", "kl nan"),
        (lambda text: text[:-15], "its last line is torn"),
    ],
)
def test_a_spoiled_table_is_never_gone_on_with(
    desk: Path, tmp_path: Path, spoil: Callable[[str], str], message: str
) -> None:
    command = [sys.executable, "-c", KILLED, str(desk), str(tmp_path / "out"), "sensitivity"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    part = tmp_path / ".out.work" / "sensitivity-0.csv"
    part.write_bytes(spoil(part.read_bytes().decode()).encode())
    result = search(desk, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{part}: not a sensitivity table" in result.output.replace("\n", "")
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_work_of_another_request_is_not_taken_over(desk: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(desk), str(tmp_path / "out"), "sensitivity"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert search(desk, tmp_path / "out", "--samples", "16").exit_code == 0
    assert not json.loads((tmp_path / "out" / "search.json").read_text())["cost"]["resumed"]
    assert search(desk, tmp_path / "whole", "--samples", "16").exit_code == 0
    assert (tmp_path / "out" / "sensitivity.csv").read_bytes() == (tmp_path / "whole" / "sensitivity.csv").read_bytes()
