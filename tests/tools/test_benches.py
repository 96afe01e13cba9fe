"""The benches of docs/performance.md run to their end, on tiny models; and what they compute from times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import as_object, as_objects
from tools import ROOT
from tools.benchmarks import attention, base_size, cpu, file_sizes, int4, scaling, training
from tools.benchmarks.measuring import DOCUMENT, fitted_exponent, load_record, paired_ratio
from tools.benchmarks.training_section import Record
from tools.rendering import read_section, write_section


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("training --rounds 1", "| tiny, 4 x 16 | masked QAT |"),
        ("scaling", "| small |"),
        ("int4", "| ort, target `cpu`, 2:4+W4 |"),
        ("base_size", "| INT8 2:4, openvino |"),
        ("attention", "| small | 4 of 4 |"),
        ("file_sizes", "| W4, stored as INT4 | INT8, FP16 in `trt` | 1.2 | 2.0 |"),
    ],
)
def test_a_bench_runs_to_its_end(command: str, row: str) -> None:
    tool, *options = command.split()
    child = subprocess.run(
        [sys.executable, "-m", f"tools.benchmarks.{tool}", "--smoke", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert row in child.stdout


@pytest.mark.parametrize(
    "tool", [attention, base_size, cpu, file_sizes, training, scaling, int4], ids=lambda tool: str(tool.__name__)
)
def test_the_committed_section_is_that_of_the_committed_record(tool: ModuleType) -> None:
    assert read_section(DOCUMENT, tool.TOOL) == tool.section(load_record(tool.FILE, tool.Record))


def test_a_record_of_another_form_is_refused_by_file_and_field(tmp_path: Path) -> None:
    record = as_object(json.loads(training.FILE.read_text(encoding="utf-8")))
    as_objects(record["steps"])[0]["batch"] = "32"
    (tmp_path / "other.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"other\.json: steps\[0\]\.batch: Expected `int`.*restore it, or measure"):
        load_record(tmp_path / "other.json", Record)


def test_ratios_are_paired_within_rounds() -> None:
    busy = [1.0, 10.0, 2.0, 5.0]  # the machine's load differs from round to round, and hits both alike
    result = paired_ratio([1.2 * seconds for seconds in busy], busy)
    assert result["ratio"] == pytest.approx(1.2)
    assert result["interval"] == pytest.approx([1.2, 1.2])


def test_exponents_are_those_of_powers() -> None:
    assert fitted_exponent([1, 10, 100], [3, 3 * 10**1.5, 3 * 10**3]) == pytest.approx(1.5)


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "performance.md"
    file.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n", encoding="utf-8")
    write_section(file, "x", "new")
    assert file.read_text(encoding="utf-8") == "before\n<!-- x: begin -->\nnew\n<!-- x: end -->\nafter\n"
    assert read_section(file, "x") == "new"
    with pytest.raises(RuntimeError, match="has no section"):
        write_section(file, "y", "new")
